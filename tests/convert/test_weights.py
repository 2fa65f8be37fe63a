"""Files of published weights: every kind gives its arrays one at a time, and wrong ones are one sentence."""

import json
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from safetensors.flax import save_file

from dalle_jax.cli import main
from dalle_jax.convert import flax_files, weights
from dalle_jax.errors import UserError
from tests.support import ROOT
from tests.support.fuzz import damaged, few_and, fuzz

BITS = np.uint16([0x3F80, 0xC2F7, 0x0001])
ARRAYS = {
    "a": np.float32([[1, 2, 3], [4, 5, 6]]),
    "b": BITS.view(jnp.bfloat16),
    "c": BITS.view(np.float16),
    "d": np.int32([-1, 2**31 - 1]),
    "e": np.zeros((0, 3), np.float32),
    "f": np.array(2.5, np.float32),
    "g": np.array([True, False]),
}


def assert_are(state, arrays):
    assert state.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (state[name].shape, state[name].dtype, state[name].ndim) == (array.shape, array.dtype, array.ndim)
        got = np.asarray(state[name])
        assert got.shape == array.shape and got.dtype == array.dtype and got.tobytes() == array.tobytes()


def test_safetensors_of_many_types_bit_for_bit(tmp_path):
    save_file({name: jnp.asarray(array) for name, array in ARRAYS.items()}, tmp_path / "a.safetensors", {"by": "me"})
    state = weights.read(tmp_path / "a.safetensors")
    assert_are(state, ARRAYS)
    widened = np.asarray(state["b"], np.float32)
    assert widened.dtype == np.float32 and widened[:2].tolist() == [1.0, -123.5]


def test_a_type_that_numpy_lacks_is_named(tmp_path):
    header = json.dumps({"scale": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError, match="got F8_E8M0 in scale: store it as another type"):
        weights.read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("chunk", [2**30, 8])
def test_flax_files_bit_for_bit(tmp_path, monkeypatch, chunk):
    """Also with arrays in pieces, as Flax writes those above a gigabyte."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    tree = {"model": {"layer": {"a": ARRAYS["a"], "b": ARRAYS["b"]}, "c": ARRAYS["c"]}, "d": ARRAYS["d"], "step": 3}
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    assert (flax_files.CHUNKED.encode() in (tmp_path / "flax_model.msgpack").read_bytes()) == (chunk == 8)
    found = {"model.layer.a": "a", "model.layer.b": "b", "model.c": "c", "d": "d"}
    assert_are(weights.read(tmp_path), {name: ARRAYS[ours] for name, ours in found.items()})


def shards(folder, kind):
    """Two shards with an index, and what they hold."""
    folder.mkdir()
    stem, suffix, write = {
        "safetensors": ("model", "safetensors", lambda path, part: save_file(part, path)),
        "flax": ("flax_model", "msgpack", lambda path, part: path.write_bytes(serialization.msgpack_serialize(part))),
    }[kind]
    where = {}
    for i, names in enumerate(("ab", "cd"), 1):
        file = f"{stem}-0000{i}-of-00002.{suffix}"
        part = {name: jnp.asarray(ARRAYS[name]) for name in names}
        write(folder / file, {"model": part} if kind == "flax" else part)
        where |= {f"model/{name}" if kind == "flax" else name: file for name in names}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return {f"model.{name}" if kind == "flax" else name: ARRAYS[name] for name in "abcd"}


@pytest.mark.parametrize("kind", ["safetensors", "flax"])
def test_shards_are_read_by_their_index_or_their_folder(tmp_path, kind):
    arrays = shards(tmp_path / "m", kind)
    (index,) = (tmp_path / "m").glob("*.json")
    assert_are(weights.read(index), arrays)
    assert_are(weights.read(tmp_path / "m"), arrays)


def rewrite(folder, change):
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    change(found["weight_map"])
    index.write_text(json.dumps(found))


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / SECOND).unlink(), f"but {SECOND} is missing: fetch"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "but model.safetensors is there too: remove"),
        (
            lambda f: (f / "model-00003-of-00003.safetensors").touch(),
            "but model-00003-of-00003.safetensors is there too",
        ),
        (lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-3]), f"whole file of weights in .*{SECOND}"),
        (
            lambda f: save_file({"c": jnp.ones(3)}, f / SECOND),
            f"in {SECOND} the arrays that .* names, but d is missing",
        ),
        (lambda f: rewrite(f, lambda m: m.pop("d")), f"in {SECOND} the arrays .* alone, but d is there too"),
        (lambda f: rewrite(f, lambda m: m.update(x=SECOND)), "but x is missing"),
        (lambda f: rewrite(f, lambda m: m.update(x="..")), r"but \.\. is missing"),
        (lambda f: rewrite(f, lambda m: m.update(x="")), "is missing"),
        (lambda f: rewrite(f, lambda m: m.update(x="model.safetensors.index.json")), "an index among its shards"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "whole file of weights in .*index.json"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[1"), "whole file of weights in .*index.json"),
    ],
)
def test_an_index_that_does_not_agree_with_its_shards_is_refused(tmp_path, damage, words):
    shards(tmp_path / "m", "safetensors")
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=words):
        weights.read(tmp_path / "m")


def test_files_of_another_kind_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist: give the file"):
        weights.read(tmp_path / "nothing.pt")
    with pytest.raises(UserError, match=r"is a folder without model\.safetensors, flax_model\.msgpack"):
        weights.read(tmp_path)
    for content in (
        b"",
        b"\0" * 64,
        b"hello\n",
        b"<html><body>404</body></html>",
        b"version https://git-lfs.github.com",
    ):
        for name in ("a.safetensors", "a.pth"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match="got a file that begins with " + re.escape(repr(content[:16]))):
                weights.read(tmp_path / name)
    save_file({"a": jnp.ones((8, 8))}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    tree = serialization.msgpack_serialize({"a": {"b": np.ones(9)}})
    for content in (whole[:-1], whole + b"\0", whole[:20], tree[:-1], tree + b"\xc0", b"PK", b"\x80\x02", b"\x81\xa1a"):
        (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"expected a whole file of weights in .*a\.bin, got .*: fetch it again"):
            weights.read(tmp_path / "a.bin")


def test_an_array_that_shrinks_after_the_names_were_read_is_one_sentence(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": jnp.ones((8, 8))}, path)
    array = weights.read(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="64 numbers from byte .* on, got 63"):
        np.asarray(array)


def test_infinite_numbers_are_named():
    for wrong in (np.inf, np.nan):
        for dtype in (np.float16, jnp.bfloat16, np.float32):
            with pytest.raises(UserError, match="got inf or nan in x.weight: fetch"):
                weights.finite("x.weight", np.array([1, wrong], dtype))
    assert weights.finite("x", np.array([True])).tolist() == [True]
    assert weights.finite("x", np.float16([65504, -65504])).dtype == np.float16


def test_the_first_wrong_name_is_said_and_how_many_there_are():
    shapes = {"a": (2,), "b": (3, 4), "c": (), "d": (5,)}
    state = {name: np.zeros(shape) for name, shape in shapes.items()}
    weights.check_names(state, shapes, what="a whole X")
    weights.check_names(state, dict.fromkeys(shapes), what="a whole X")  # of any shape
    for change, message in (
        ({"a": None}, "expected a whole X, but a is missing: fetch the file again"),
        ({"a": None, "b": None, "d": None, "e": ()}, "expected a whole X, but a and 2 more are missing: fetch"),
        ({"e": ()}, "expected a whole X alone, but e is there too: remove what is not it"),
        ({"f": (), "e": (), "a": (3,)}, "expected a whole X alone, but e and 1 more are there too: remove"),
        ({"b": (4, 3)}, r"expected a whole X, b of shape \(3, 4\), got \(4, 3\): fetch"),
        (
            {"b": (12,), "c": (1,), "d": ()},
            r"expected a whole X, b of shape \(3, 4\), got \(12,\), and 2 more of other shapes: fetch",
        ),
    ):
        sizes = {name: shape for name, shape in {**shapes, **change}.items() if shape is not None}
        with pytest.raises(UserError, match="^" + message):
            weights.check_names({name: np.zeros(shape) for name, shape in sizes.items()}, shapes, what="a whole X")


def test_whole_modules_of_torch_are_read_only_if_allowed(tmp_path):
    torch = pytest.importorskip("torch", reason="reading a module takes PyTorch: pip install 'dalle-jax[convert]'")
    module = torch.nn.Linear(2, 3)
    torch.save(module, tmp_path / "module.pkl")
    with pytest.raises(UserError, match=r"would call torch.nn.modules.linear.Linear.*module\.state_dict\(\)") as error:
        weights.read(tmp_path / "module.pkl")
    assert "--allow-pickle" not in str(error.value)
    read = weights.read(tmp_path / "module.pkl", allow_pickle=True)
    np.testing.assert_array_equal(read["weight"], module.weight.detach().numpy())
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(UserError, match="expected a module or its state dict"):
        weights.read(tmp_path / "list.pt", allow_pickle=True)
    save_file({"a": jnp.ones(2)}, tmp_path / "a.safetensors")
    assert np.asarray(weights.read(tmp_path / "a.safetensors", allow_pickle=True)["a"]).tolist() == [1, 1]


MEMORY = """
import sys
import numpy as np
from dalle_jax.convert import weights

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

for path in sys.argv[1:]:
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the highest memory is counted from here
    arrays = {name: np.array(array) for name, array in weights.read(path).items()}
    assert sum(array.sum() for array in arrays.values()) == 16 * 2**20
    print(memory("VmHWM") - before)
    del arrays
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="takes Linux's count of memory")
def test_memory_is_the_size_of_the_file_and_a_few_arrays(tmp_path):
    """64 MiB in arrays of 4 MiB, in a process of its own: a second copy of the file would show."""
    torch = pytest.importorskip("torch", reason="writing a .pt takes PyTorch: pip install torch")
    arrays = {f"layer{i}": np.full((1024, 1024), i == 0, np.float32) + np.float32(i != 0) for i in range(16)}
    save_file({name: jnp.asarray(array) for name, array in arrays.items()}, tmp_path / "a.safetensors")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.save(tensors, tmp_path / "a.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "a.msgpack").write_bytes(serialization.msgpack_serialize(arrays))
    files = [tmp_path / name for name in ("a.safetensors", "a.pt", "old.pt", "a.msgpack")]
    words = [sys.executable, "-c", MEMORY, *files]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    for file, grown in zip(files, map(float, done.stdout.split()), strict=True):
        assert 60 < grown < 64 + 5 * 4, (file.name, done.stdout)


@few_and(5_000, few=150)
@pytest.mark.parametrize("name", ["a.safetensors", "a.msgpack", "model.safetensors.index.json"])
def test_damaged_files_give_arrays_or_one_sentence(tmp_path, name, inputs):
    save_file({key: jnp.asarray(array) for key, array in ARRAYS.items()}, tmp_path / "a.safetensors")
    tree = {"a": {"b": ARRAYS["a"], "c": ARRAYS["b"]}, "d": ARRAYS["c"], "n": None}
    (tmp_path / "a.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    where = dict.fromkeys(ARRAYS, "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())

    def check(content):
        (tmp_path / name).write_bytes(content)
        try:
            for array in weights.read(tmp_path / name).values():
                assert np.asarray(array).shape == array.shape
        except UserError as error:
            assert "\n" not in str(error)

    fuzz(check, damaged((tmp_path / name).read_bytes()), inputs=inputs)


def test_a_family_that_is_unknown_or_missing_is_one_line(capsys):
    for words, message in ((["convert"], "FAMILY"), (["convert", "vae"], "'vae'")):
        assert main.main(words) == 2
        assert message in capsys.readouterr().err
