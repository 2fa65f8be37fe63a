"""The examples of the documentation run, in order, with a tiny random model in place of a trained one."""

import re
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import dalle_jax
from tests.support import ROOT
from tests.support.tiny_model import BrightIsBest

DOCS = ROOT / "docs"


def python_of(name: str) -> str:
    """All Python of a page as one program, on the lines where it stands."""
    text = (DOCS / name).read_text()
    code = ["\n"] * len(text.splitlines())
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        first = text[: block.start(1)].count("\n")
        lines = block[1].splitlines(keepends=True)
        code[first : first + len(lines)] = lines
    return "".join(code)


def load_anything(monkeypatch, model, path):
    """`Pipeline.load(path)` loads a random model that can rank and guide.

    Its batches are of four, so that one program draws most of the pictures.
    """
    load = dalle_jax.Pipeline.load

    def loaded(asked, **kwargs):
        assert asked == path
        pipe = load(model, devices=jax.devices()[:1], **kwargs)
        pipe.generator.can_guide, pipe.reranker = True, BrightIsBest()
        monkeypatch.setattr(pipe, "_capacity", {False: (4, "4 at a time"), True: (4, "4 at a time")})
        return pipe

    monkeypatch.setattr(dalle_jax.Pipeline, "load", loaded)


def test_readme(model_folder, tmp_path, monkeypatch):
    load_anything(monkeypatch, model_folder, "demo/transformer")
    monkeypatch.chdir(tmp_path)
    names = {}
    code = python_of("../README.md").replace("top_k=50", "top_k=9")  # of a vocabulary of 12
    exec(compile(code, "README.md", "exec"), names)
    assert [picture.seed for picture in names["pictures"]] == [0, 1, 2, 3]
    assert Image.open("picture.png").info["seed"] == "0" and Path("so_far.png").exists()


def test_sampling(model_folder, tmp_path, monkeypatch):
    load_anything(monkeypatch, model_folder, "runs/transformer")
    monkeypatch.chdir(tmp_path)
    names = {}
    code = python_of("sampling.md").replace("top_k=200", "top_k=9")  # of a vocabulary of 12
    exec(compile(code, "docs/sampling.md", "exec"), names)
    assert [picture.seed for picture in names["pictures"]] == [0, 1, 2, 3]
    assert Image.open("first.png").info["seed"] == "0" and Path("half-0.png").exists()
    assert names["best"][0].score >= names["best"][1].score and len(names["close"]) == 4
    assert [len(pictures) for pictures in (names["red"], names["star"])] == [4, 4]
    assert len(names["completed"]) == 4 and names["completed"][0].settings["keep_rows"] == 1
    assert names["tokens"].shape == (names["pipe"].generator.model.config.layout.image_len,)
    assert names["pixels"].shape == (*names["pictures"][0].size, 3) and names["pixels"].dtype == np.uint8
    megabytes = [round(names[name] / 1e6) for name in ("kept_bytes", "read_bytes", "text_bytes")]
    assert megabytes == [287, 35, 260]
