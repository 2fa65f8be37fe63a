"""Inception v3 gives the numbers of pytorch-fid's and torchvision's networks.

The golden file holds what those networks made of two pictures with seeded weights (`weights`, numpy alone, so the file
is small); `python -m tests.models.test_inception` writes it with PyTorch, torchvision and pytorch-fid installed, and it
may change only with the seeds chosen here. With those packages the same comparison runs live at the published size.
"""

import argparse
import zlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dalle_jax import model_dir
from dalle_jax.convert import inception as importer
from dalle_jax.convert.state_dict import read_state_dict
from dalle_jax.errors import UserError
from dalle_jax.models import inception
from tests.support import GOLDEN

GOLDEN_FILE = GOLDEN / "inception.npz"
SIDE = 123  # the last grid is 2 x 2, where all kinds of pools differ
TOLERANCE = 1e-4  # relative to the largest value: float32 through 48 layers, another order of summation


def torch_names(pools: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published state dict, told from our definition backwards."""
    config = inception.InceptionConfig(pools=pools)
    kernels = {"1a": "3x3", "2a": "3x3", "2b": "3x3", "3b": "1x1", "4a": "3x3"}
    theirs = {ours: name for name, ours in importer._LEAVES.items()}
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(inception.model(config).abstract):
        *modules, last = (key.key for key in path)
        if modules == ["logits"]:
            found[f"fc.{last}"] = leaf.shape[::-1]
            continue
        if modules[0].startswith("conv_"):
            place = modules[0].removeprefix("conv_")
            modules = [f"Conv2d_{place}_{kernels[place]}"]
        name = ".".join(modules).replace("mixed_", "Mixed_")
        shape = leaf.shape if leaf.ndim == 1 else tuple(leaf.shape[i] for i in (3, 2, 0, 1))
        found[f"{name}.{theirs[last]}"] = shape
    return found


def weights(pools: str) -> dict[str, np.ndarray]:
    """A state dict of random numbers that keep activations near 1; each array has its name's own seed."""
    state = {}
    for name, shape in torch_names(pools).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if len(shape) > 1:
            value = rng.standard_normal(shape, np.float32) * np.float32((2 / np.prod(shape[1:])) ** 0.5)
        elif name.endswith(("running_var", "bn.weight")):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = 0.1 * rng.standard_normal(shape)
        state[name] = value.astype(np.float32)
    return state


def pictures(side: int, count: int = 2) -> np.ndarray:
    """uint8 noise of two coarsenesses [count, side, side, 3]."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 192, (count, side // 8 + 1, side // 8 + 1, 3)).repeat(8, 1).repeat(8, 2)[:, :side, :side]
    return (coarse + rng.integers(0, 64, (count, side, side, 3))).astype(np.uint8)


def import_torchvision(why: str):
    """torch, with torchvision imported as well; skips the test for this reason where either is missing."""
    torch = pytest.importorskip("torch", reason=why)
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # a build without its compiled operators, of which nothing here is used
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor a, Tensor b, float c) -> Tensor")
    except ImportError:
        pytest.skip(why)
    return torch


def reference(pools: str, state: dict[str, np.ndarray], x_BHWC: np.ndarray):
    """pool3 and logits of the published network in PyTorch."""
    why = "the comparison takes PyTorch, torchvision and pytorch-fid: pip install torch torchvision pytorch-fid"
    torch = import_torchvision(why)
    from torchvision.models import inception_v3

    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    if pools == "fid":
        fid = pytest.importorskip("pytorch_fid.inception", reason=why)
        fid.load_state_dict_from_url = lambda *_, **__: tensors  # it would fetch the published file
        network = fid.fid_inception_v3()
    else:
        network = inception_v3(weights=None, aux_logits=False, init_weights=False)
        network.load_state_dict(tensors)
    network.eval()
    pool3 = []
    network.avgpool.register_forward_hook(lambda module, inputs, output: pool3.append(output))
    with torch.no_grad():
        logits = network(torch.from_numpy(x_BHWC).permute(0, 3, 1, 2))
    return pool3[0][:, :, 0, 0].numpy(), logits.numpy()


def as_ours(pools: str, pool3, logits):
    """What we give of them: the logits of FID's network without their bias."""
    return pool3, logits - weights(pools)["fc.bias"] if pools == "fid" else logits


def scaled(images_uint8):
    return images_uint8.astype(np.float32) / 127.5 - 1


def assert_near(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape and one.dtype == np.float32
        assert np.abs(one - other).max() <= TOLERANCE * np.abs(other).max()


@pytest.fixture(scope="module", params=inception.CLASSES)
def ours(request):
    """Pools, definition, parameters and compiled features of a network with seeded weights."""
    config, params = importer.convert(weights(request.param))
    model = inception.model(config)
    return request.param, model, params, jax.jit(model.apply)


def test_golden_numbers(ours):
    pools, model, params, features = ours
    got = features(params, scaled(pictures(SIDE)))
    with np.load(GOLDEN_FILE) as golden:
        want = golden[f"{pools}:pool3"], golden[f"{pools}:logits"]
    assert want[0].shape == (2, 2_048) and want[1].shape == (2, inception.CLASSES[pools])
    assert np.abs(want[0][0] - want[0][1]).max() > 100 * TOLERANCE * np.abs(want[0]).max()  # pictures tell apart
    assert_near(map(np.asarray, got), as_ours(pools, *want))


def test_every_name_of_the_pools_matters():
    """The golden numbers of the two networks differ by their pools alone, far beyond the tolerance."""
    with np.load(GOLDEN_FILE) as golden:
        fid, other = golden["fid:pool3"], golden["torchvision:pool3"]
    assert np.abs(fid - other).max() > 100 * TOLERANCE * np.abs(fid).max()


def test_pytorch_and_jax_agree_at_the_published_size(ours):
    pools, model, params, features = ours
    x_BHWC = scaled(pictures(inception.SIDE, 1))
    want = reference(pools, weights(pools), x_BHWC)
    assert_near(map(np.asarray, features(params, x_BHWC)), as_ours(pools, *want))


def test_the_golden_file_is_what_pytorch_gives():
    with np.load(GOLDEN_FILE) as golden:
        for pools in inception.CLASSES:
            want = reference(pools, weights(pools), scaled(pictures(SIDE)))
            assert_near((golden[f"{pools}:pool3"], golden[f"{pools}:logits"]), want)


def test_a_pool_averages_what_is_inside_the_picture():
    x = np.arange(1.0, 10).reshape(1, 3, 3, 1).astype(np.float32)
    assert inception._mean(x)[0, 0, 0, 0] == (1 + 2 + 4 + 5) / 4 and inception._mean(x)[0, 1, 1, 0] == 5
    assert inception._mean_with_padding(x)[0, 0, 0, 0] == np.float32((1 + 2 + 4 + 5) / 9)
    assert inception._same_max(-x)[0, 2, 2, 0] == -5  # padding is no zero
    assert inception._halving_max(x).shape == (1, 1, 1, 1) and inception._halving_max(x)[0, 0, 0, 0] == 9


def test_through_the_command(tmp_path, capsys):
    state = weights("fid") | {"AuxLogits.fc.bias": np.zeros(3), "Conv2d_1a_3x3.bn.num_batches_tracked": np.int64(0)}
    save_file({name: np.asarray(value) for name, value in state.items()}, tmp_path / "fid.safetensors")
    parser = argparse.ArgumentParser()
    importer.add_arguments(parser)
    args = parser.parse_args([f"{tmp_path}/fid.safetensors", "--out", f"{tmp_path}/out"])
    assert importer.main(args) == 0
    assert "1008 classes" in capsys.readouterr().out
    params = model_dir.load(tmp_path / "out", name="inception").params
    array = state["Mixed_6b.branch7x7_2.conv.weight"]
    np.testing.assert_array_equal(params["mixed_6b"]["branch7x7_2"]["weight"], array.transpose(2, 3, 1, 0))
    with pytest.raises(UserError, match="empty directory"):
        importer.main(args)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("Mixed_7c.branch_pool.bn.running_var"), "mixed_7c/branch_pool/variance"),
        (lambda s: s.update({"Mixed_8a.x.conv.weight": np.zeros((1, 1, 1, 1))}), "mixed_8a"),
        (lambda s: s.update({"fc.weight": np.zeros((10, 2_048)), "fc.bias": np.zeros(10)}), "10 classes"),
        (lambda s: s.pop("fc.weight"), "no fc.weight"),
        (lambda s: s.update({"Conv2d_1a_3x3.bn.bias": np.full(32, np.nan)}), "Conv2d_1a_3x3.bn.bias"),
        (lambda s: s.update({"Conv2d_1a_3x3.bn.bias": np.zeros(31)}), "conv_1a/bias"),
    ],
)
def test_wrong_state_dicts_are_refused(damage, message):
    state = {name: np.zeros(shape, np.float32) for name, shape in torch_names("fid").items()}
    damage(state)
    with pytest.raises(UserError, match=message):
        importer.convert(state)


def test_a_file_that_is_no_state_dict_is_refused(tmp_path):
    """Its bytes are read as a pickle; what that stumbles on depends on the first of them."""
    pytest.importorskip("torch", reason="reading a .pth takes PyTorch: pip install 'dalle-jax[convert]'")
    for content in (b"hello\n", b"abc def\n", b"<html></html>", b"PK", b""):
        (tmp_path / "a.pth").write_bytes(content)
        with pytest.raises(UserError, match="expected a state dict"):
            read_state_dict(str(tmp_path / "a.pth"))


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="pools"):
        inception.InceptionConfig(pools="clean")
    with pytest.raises(ValueError, match="narrow"):
        inception.InceptionConfig(narrow=3)
    model = inception.model(inception.InceptionConfig(narrow=16))
    with pytest.raises(ValueError, match="75"):
        jax.eval_shape(model.apply, model.abstract, np.zeros((1, 64, 64, 3)))


def test_a_narrow_network_has_every_name():
    narrow, full = (inception.model(inception.InceptionConfig(narrow=n)) for n in (16, 1))
    assert jax.tree.structure(narrow.abstract) == jax.tree.structure(full.abstract)
    classifier = 2_049 * 1_008
    assert full.num_params == 21_785_568 + 2 * 17_216 + classifier  # Keras and torchvision count the rest the same


if __name__ == "__main__":
    arrays = {}
    for pools in inception.CLASSES:
        pool3, logits = reference(pools, weights(pools), scaled(pictures(SIDE)))
        arrays |= {f"{pools}:pool3": pool3, f"{pools}:logits": logits}
    np.savez_compressed(GOLDEN_FILE, **arrays)
    print(GOLDEN_FILE, GOLDEN_FILE.stat().st_size, "bytes")
