"""PyTorch's files are read as PyTorch reads them, and nothing of them is ever run.

The golden files were written by PyTorch 2.13 (`python -m tests.convert.test_pickles`), so that reading is held where
PyTorch is not installed; they may change only with the arrays chosen here.
"""

import codecs
import io
import struct
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dalle_jax.convert import weights
from dalle_jax.errors import UserError
from tests.support import GOLDEN
from tests.support.fuzz import damaged, few_and, fuzz

ARCHIVE, LEGACY = GOLDEN / "state_dict.pt", GOLDEN / "state_dict_legacy.pt"
# Name -> type, shape and bits of what the golden files hold.
ARRAYS = {
    "float": np.float32([[0.5, -1.25, 3.0], [1e-30, 65504.0, -2.0]]),
    "turned": np.float32([[0.5, 1e-30], [-1.25, 65504.0], [3.0, -2.0]]),  # a view of 'float'
    "half": np.float16([0.1, -65504.0, 6e-8]),
    "brain": np.uint16([0x3F80, 0xC2F7, 0x0001, 0x7F7F]),  # the bits of bfloat16
    "long": np.int64([-(2**63), 2**53 + 1]),
    "bool": np.array([True, False, True]),
    "number": np.array(7.5, np.float64),
    "none": np.zeros((0, 4), np.float32),
}


def tensors(torch):
    made = {name: torch.from_numpy(array.copy()) for name, array in ARRAYS.items() if name != "brain"}
    made["turned"] = made["float"].t()
    made["brain"] = torch.from_numpy(ARRAYS["brain"].view(np.int16).copy()).view(torch.bfloat16)
    return made


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="compares with PyTorch: pip install torch")


@pytest.mark.parametrize("path", [ARCHIVE, LEGACY])
def test_golden_files_give_their_arrays_bit_for_bit(path):
    state = weights.read(path)
    assert state.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        want = array.view(jnp.bfloat16) if name == "brain" else array
        assert (state[name].shape, state[name].dtype) == (want.shape, want.dtype)
        np.testing.assert_array_equal(bits(np.asarray(state[name])), bits(want))


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@few_and(2_000, few=25)
@pytest.mark.parametrize("archive", [True, False])
def test_any_views_are_what_pytorch_reads(torch, tmp_path, archive, inputs):
    """Random views of shared storages of every type, saved and read by both."""
    types = [
        torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    ]  # fmt: skip
    shapes = st.lists(st.integers(0, 4), max_size=4)
    cuts = st.tuples(st.integers(0, 3), st.integers(1, 3), st.randoms(use_true_random=False))

    def check(numbers, shape, cuts):
        whole = (torch.arange(int(np.prod(shape, dtype=int))).reshape(shape) % 251).to(numbers)
        saved = {"whole": whole, "parameter": torch.nn.Parameter(whole.clone(), requires_grad=False)}
        for i, (first, step, random) in enumerate(cuts):
            view = whole[first::step] if shape else whole.expand(2, first)
            saved[f"view{i}"] = view.permute(*random.sample(range(view.ndim), view.ndim))
        torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=archive)
        theirs, ours = torch.load(tmp_path / "a.pt", weights_only=True), weights.read(tmp_path / "a.pt")
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            array = np.asarray(ours[name])
            assert array.shape == ours[name].shape == tuple(tensor.shape)
            assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")
            np.testing.assert_array_equal(
                bits(array), tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy()
            )

    fuzz(check, st.sampled_from(types), shapes, st.lists(cuts, max_size=2), inputs=inputs)


def archive_of(pickled: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return out.getvalue()


def legacy_of(pickled: bytes) -> bytes:
    """Magic number, protocol and system of PyTorch before 1.6, then the object; without storages."""
    return b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}." + pickled + b"\x80\x02]."


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def calls(module: str, name: str, argument: str) -> dict[str, bytes]:
    """Pickles that call a function when Python reads them, in the ways there are."""
    named, value = f"c{module}\n{name}\n".encode(), text(argument)
    by_parts = text(module) + text(name) + b"\x93"
    return {
        "reduced": b"\x80\x02" + named + value + b"\x85R.",
        "by parts": b"\x80\x04" + by_parts + value + b"\x85R.",
        "as a class": b"\x80\x02" + named + value + b"\x85\x81.",
        "with keywords": b"\x80\x04" + named + value + b"\x85}\x92.",
        "as an object": b"\x80\x02(" + named + value + b"o.",
        "as an instance": b"\x80\x02(" + value + f"i{module}\n{name}\n.".encode(),
        "remembered": b"\x80\x02" + named + b"q\x000h\x00" + value + b"\x85R.",
        "within a state dict": b"\x80\x02}" + text("a") + named + value + b"\x85Rs.",
        "as a key": b"\x80\x02}" + named + b"Ns.",
        "behind a harmless one": b"\x80\x02ccollections\nOrderedDict\n)R}" + text("x") + named + b"sb.",
    }


HOSTILE = [
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("__builtin__", "getattr"),
    ("numpy", "load"),
    ("omegaconf", "os.system"),
    ("pytorch_lightning.callbacks.os", "system"),
    ("torch.hub", "load"),
]


@pytest.mark.parametrize("wrap", [archive_of, legacy_of])
@pytest.mark.parametrize("module, name", HOSTILE)
def test_a_file_that_would_call_something_is_refused_by_its_name(tmp_path, wrap, module, name):
    for how, pickled in calls(module, name, f"touch {tmp_path}/ran").items():
        (tmp_path / "a.pt").write_bytes(wrap(pickled))
        with pytest.raises(
            UserError, match=f"but it would call {module}.{name}, and nothing of it was run: ask"
        ) as found:
            weights.read(tmp_path / "a.pt")
        assert "pickle" not in str(found.value), how  # no advice to read it in the unsafe way
    assert not (tmp_path / "ran").exists()


def test_such_files_do_run_when_python_reads_them(tmp_path):
    """So that the test above is of pickles that would do it."""
    import pickle

    for how, pickled in calls("os", "mkdir", f"{tmp_path}/ran").items():
        if how in ("as a class", "with keywords", "as a key", "behind a harmless one"):
            continue  # of a function, Python refuses or only names it
        pickle.loads(pickled)
        (tmp_path / "ran").rmdir()


CLASSES = [
    "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint ModelCheckpoint",
    "pytorch_lightning.utilities.parsing AttributeDict",
    "lightning.fabric.utilities.data AttributeDict",
    "omegaconf.dictconfig DictConfig",
    "omegaconf.listconfig ListConfig",
    "omegaconf.base ContainerMetadata",
    "omegaconf.nodes AnyNode",
    "collections defaultdict",
    "argparse Namespace",
    "pathlib PosixPath",
    "typing Any",
]


@pytest.mark.parametrize("name", CLASSES)
def test_harmless_objects_beside_the_state_dict_are_left_out(torch, tmp_path, name):
    """Each as a key, as an object with attributes and with items of its own, as trainers store them."""
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 3, "state_dict": {"w": torch.ones(2)}, "optimizer": {"state": {0: torch.ones(1)}}}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    (pickled,) = (entry for entry in entries if entry.endswith("/data.pkl"))
    named = "c{}\n{}\n".format(*name.split()).encode()
    states = named + b")\x81}(" + text("monitor") + text("val") + text("best") + b"G?\xf0\0\0\0\0\0\0ub"
    items = named + b")R" + text("a") + b"K\x01s"
    extra = text("callbacks") + b"}" + named + states + b"s" + text("more") + items
    assert entries[pickled].endswith(b"u.")
    entries[pickled] = entries[pickled][:-2] + extra + b"u."
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    assert {name: np.asarray(array).tolist() for name, array in weights.read(path).items()} == {"w": [1, 1]}


def one_tensor(*, shape=b"K\x02\x85", strides=b"K\x01\x85", first=b"K\x00", size=b"K\x02") -> bytes:
    """An archive of Python 2, which gives the pairs of a dict at once, with two numbers that lay on a GPU."""
    storage = b"(" + text("storage") + b"ctorch.cuda\nHalfStorage\n" + text("0") + text("cuda:0") + size + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + first + shape + strides + b"tR"
    pairs = b"](]" + text("w") + b"a" + tensor + b"ae"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"\x85R.")
        archive.writestr("a/data/0", np.float16([1.5, -2]).tobytes())
    return out.getvalue()


def test_files_of_python_2_and_of_accelerators(tmp_path):
    (tmp_path / "a.pt").write_bytes(one_tensor())
    array = np.asarray(weights.read(tmp_path / "a.pt")["w"])
    assert array.dtype == np.float16 and array.tolist() == [1.5, -2]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"shape": b"K\x03\x85"}, "larger than its storage"),
        ({"strides": b"K\x02\x85"}, "larger than its storage"),
        ({"first": b"K\x01"}, "larger than its storage"),
        ({"first": b"J\xff\xff\xff\xff"}, "an impossible shape"),
        ({"shape": b"J\xff\xff\xff\xff\x85"}, "an impossible shape"),
        ({"strides": b"J\xff\xff\xff\xff\x85"}, "an impossible shape"),
        ({"shape": b"K\x01K\x02\x86"}, "an impossible shape"),
        ({"shape": b"\x88\x85"}, "an impossible shape"),
        ({"size": b"K\x03"}, "a storage of 4 bytes for 3 numbers"),
        ({"size": b"J\xff\xff\xff\xff"}, "a storage of a form that is not known"),
    ],
)
def test_a_tensor_cannot_reach_beyond_its_numbers(tmp_path, change, words):
    (tmp_path / "a.pt").write_bytes(one_tensor(**change))
    with pytest.raises(UserError, match=words):
        weights.read(tmp_path / "a.pt")


def test_wrong_files_are_one_sentence(tmp_path):
    whole, legacy = ARCHIVE.read_bytes(), LEGACY.read_bytes()
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
    for content, words in (
        (whole[: len(whole) // 2], "expected a whole file of weights in .*: fetch it again"),
        (legacy[:-3], "expected a whole file of weights"),
        (legacy[:40], "expected a whole file of weights"),
        (archive_of(b"\x80\x02].")[:-30], "expected a whole file of weights"),
        (archive_of(b"\x80\x02]."), "expected a state dict .*, got a list without any"),
        (archive_of(b"\x80\x02}" + text("a") + b"K\x01s."), "expected a state dict .*, got a dict without any"),
        (compressed.getvalue(), "a compressed data.pkl"),
        (whole.replace(b"little", b"biglit"), "Bad CRC-32"),
        (legacy.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"), "in the order of another processor"),
        (
            legacy.replace(b"\x03" + bytes(7) + b"\x01\0\x01", b"\x02" + bytes(7) + b"\x01\0\x01"),
            "a storage of 0 numbers for 6",
        ),
        (b"\x80\x02}.", "another pickle than torch.save makes"),
    ):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(UserError, match=words):
            for array in weights.read(tmp_path / "a.pt").values():
                np.asarray(array)


RUN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "exec",
    "compile",
    "pickle.find_class",
    "ctypes.dlopen",
)


class Watch:
    """Remembers what Python was asked to run while it is on; a hook stays until the process ends."""

    def __init__(self):
        self.on, self.seen = False, set()
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if self.on and event in RUN:
            self.seen.add(event)


@pytest.fixture(scope="module")
def watch():
    return Watch()


@few_and(5_000, few=150)
@pytest.mark.parametrize("path", [ARCHIVE, LEGACY])
def test_damaged_files_give_arrays_or_one_sentence_and_run_nothing(tmp_path, watch, path, inputs):
    file = tmp_path / "a.pt"
    weights.read(path)  # what Python runs of its own at first use: modules and text codecs
    for codec in ("cp437", "raw-unicode-escape"):
        codecs.lookup(codec)

    def check(content):
        file.write_bytes(content)
        watch.on = True
        try:
            for array in weights.read(file).values():
                assert np.asarray(array).shape == array.shape
        except UserError as error:
            assert "\n" not in str(error)
        finally:
            watch.on = False

    fuzz(check, damaged(path.read_bytes()), inputs=inputs)
    assert not watch.seen


if __name__ == "__main__":
    import torch as pytorch

    pytorch.save(tensors(pytorch), ARCHIVE)
    pytorch.save(tensors(pytorch), LEGACY, _use_new_zipfile_serialization=False)
    print(ARCHIVE, ARCHIVE.stat().st_size, LEGACY, LEGACY.stat().st_size)
