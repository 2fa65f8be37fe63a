"""Files of published weights: safetensors, PyTorch's own, pickled modules only if allowed, and the wrong ones."""

import pickle

import numpy as np
import pytest

from dalle_jax.cli import main
from dalle_jax.convert import weights
from dalle_jax.errors import UserError


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        weights.read(tmp_path / "nothing.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(UserError, match="does not read as one"):
        weights.read(tmp_path / "broken.safetensors")


def test_torch_files_are_read_and_modules_only_if_allowed(tmp_path):
    torch = pytest.importorskip("torch", reason="reading a .pth takes PyTorch: pip install 'dalle-jax[convert]'")
    module = torch.nn.Linear(2, 3)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    read = weights.read(tmp_path / "state.pt", allow_pickle=False)
    np.testing.assert_array_equal(read["weight"], module.weight.detach().numpy())

    torch.save(module, tmp_path / "module.pkl")
    with pytest.raises(UserError, match=r"module\.state_dict\(\).* or pass --allow-pickle"):
        weights.read(tmp_path / "module.pkl", allow_pickle=False)
    assert weights.read(tmp_path / "module.pkl", allow_pickle=True).keys() == read.keys()
    (tmp_path / "list.pt").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError):
        weights.read(tmp_path / "list.pt", allow_pickle=True)
    for content in (b"hello\n", b"abc def\n", b"<html></html>", b"PK", b""):  # read as pickles, each stumbles elsewhere
        (tmp_path / "a.pth").write_bytes(content)
        with pytest.raises(UserError, match="expected a state dict") as error:
            weights.read(tmp_path / "a.pth")
        assert "--allow-pickle" not in str(error.value)


def test_a_family_that_is_unknown_or_missing_is_one_line(capsys):
    for words, message in ((["convert"], "FAMILY"), (["convert", "vae"], "'vae'")):
        assert main.main(words) == 2
        assert message in capsys.readouterr().err
