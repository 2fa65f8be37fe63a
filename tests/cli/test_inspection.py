"""`inspect` and `export`: what a run says about itself, and its parameters alone."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from dalle_jax import model_dir, models
from dalle_jax.checkpoint import digest, manager, reader
from dalle_jax.cli import main
from dalle_jax.cli.inspect import inspect
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from tests.support.line_task import MODEL, line_settings, line_step, train


@pytest.fixture(autouse=True)
def known_model(monkeypatch):
    monkeypatch.setitem(models._MODELS, "line", (dict, lambda config: MODEL))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(line_settings()) | {"name": "line", "model": {}}))
    (path / "tokenizer.model").write_text("as it is")
    train(path)
    return path


def said(capsys, *words):
    assert main.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_inspect_says_where_a_run_stands(workdir, capsys):
    found = json.loads(said(capsys, "inspect", workdir, "--json"))
    assert (found["step"], found["data"]) == (12, {"position": 12})
    assert found["config"] == json.loads((workdir / "config.json").read_text())
    assert [entry["step"] for entry in found["checkpoints"]] == [8, 12]
    size = sum(path.stat().st_size for path in (workdir / "checkpoints" / "12").rglob("*") if path.is_file())
    assert found["checkpoints"][1]["bytes"] == size and found["checkpoints"][1]["damage"] is None
    assert 0 < found["goodput"]["goodput"] < 1 and found["goodput"]["starts"] == 1
    params = model_dir.load(workdir, average=False).params
    assert found["parameters_sha256"] == digest.of_tree(params)
    digests = {found[f"{name}_sha256"] for name in ("parameters", "average", "state")}
    assert len(digests) == 3 and all(len(digest) == 64 for digest in digests)
    assert inspect(workdir, 8)["state_sha256"] != found["state_sha256"]
    text = said(capsys, "inspect", workdir)
    assert found["state_sha256"] in text and "update       12 of 12" in text and "goodput" in text
    assert f"compression  {json.dumps(found['config']['compression'])}" in text


def test_the_digests_do_not_depend_on_the_mesh_a_run_was_saved_on(workdir, tmp_path):
    abstract = line_step(make_mesh({"fsdp": 4, "tensor": 2})).abstract
    saved = manager.Checkpoints(workdir, keep=9)
    _, state, position = saved.restore_latest(abstract)
    saved.close()
    assert len(state["params"]["matrix"].addressable_shards[0].data.ravel()) == 8
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    writer = manager.Checkpoints(tmp_path, keep=1)
    writer.save(12, state, position)
    writer.close()
    one, eight = inspect(workdir), inspect(tmp_path)
    for name in ("parameters_sha256", "average_sha256", "state_sha256", "data"):
        assert one[name] == eight[name]


def test_a_device_that_is_not_there_is_no_damage(workdir, monkeypatch, capsys):
    def none():
        raise AssertionError  # as JAX says it under JAX_PLATFORMS=cuda

    monkeypatch.setattr(jax, "devices", none)
    for words in (["inspect"], ["export", f"{workdir}-out"]):
        assert main.main([words[0], str(workdir), *words[1:]]) == 2
        said = capsys.readouterr().err
        assert "expected a device for JAX_PLATFORMS=cpu, got none" in said and said.count("\n") == 1


def test_inspect_names_damage(workdir, tmp_path, capsys):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    path = copy / "checkpoints" / "8" / "data" / "metadata"
    path.write_text(path.read_text().replace("8", "9"))
    assert "DAMAGED: data/metadata is not what was written" in said(capsys, "inspect", copy)


def test_with_its_newest_checkpoint_damaged_a_run_stands_at_the_one_before(workdir, tmp_path, capsys):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    path = copy / "checkpoints" / "12" / "state" / "_METADATA"
    path.write_bytes(path.read_bytes()[:-1])
    found = inspect(copy)
    assert (found["step"], found["state_sha256"]) == (8, inspect(workdir, 8)["state_sha256"])
    assert [bool(entry["damage"]) for entry in found["checkpoints"]] == [False, True]
    text = said(capsys, "inspect", copy)
    assert "update       8 of 12" in text and text.count("DAMAGED") == 1
    with pytest.raises(UserError, match="checkpoints/12, got one where state/_METADATA .*: move that folder away"):
        inspect(copy, 12)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_checkpoint_that_the_run_deletes_meanwhile_is_not_damaged(workdir, tmp_path, monkeypatch, when):
    copy, describe = shutil.copytree(workdir, tmp_path / "copy"), reader.describe

    def deleted(path):
        if path.name == "8" and when == "before":
            shutil.rmtree(path)
        entry = describe(path)
        if path.name == "8":
            shutil.rmtree(path)
        return entry

    monkeypatch.setattr(reader, "describe", deleted)
    found = inspect(copy)
    assert found["step"] == 12 and [(e["step"], e["damage"]) for e in found["checkpoints"]] == [(12, None)]


def test_export_gives_a_model_directory(workdir, tmp_path, capsys):
    said(capsys, "export", workdir, tmp_path / "average")
    said(capsys, "export", workdir, tmp_path / "raw", "--raw", "--step", 8)
    for name, average, number in [("average", True, None), ("raw", False, 8)]:
        found = model_dir.load(tmp_path / name)
        exported, params = found.config, found.params
        assert set(exported) == {"name", "model"}
        wanted = model_dir.load(workdir, average=average, step=number).params
        assert params.keys() == wanted.keys()
        for key in params:
            np.testing.assert_array_equal(params[key], wanted[key])
        assert (tmp_path / name / "tokenizer.model").read_text() == "as it is"
    found = inspect(tmp_path / "average")
    assert found["step"] is None and found["parameters_sha256"] == inspect(workdir)["average_sha256"]


def test_what_is_not_there_is_refused(workdir, tmp_path, capsys):
    with pytest.raises(UserError, match="step 5 in .*, got those of 8, 12: take one"):
        inspect(workdir, 5)
    main.main(["export", str(workdir), str(tmp_path / "model")])
    assert main.main(["export", str(tmp_path / "model"), str(tmp_path / "again"), "--step=8"]) == 2
    assert "got the model in" in capsys.readouterr().err
    with pytest.raises(UserError, match="check the path"):
        inspect(tmp_path)
    assert main.main(["export", str(workdir), str(workdir)]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
