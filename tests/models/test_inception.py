"""Inception v3 gives the numbers of pytorch-fid's and torchvision's networks.

The golden file holds what those networks made of two pictures with seeded weights (numpy alone, so the file
is small); `python -m tests.models.test_inception` writes it with PyTorch, torchvision and pytorch-fid installed, and it
may change only with the seeds chosen here. With those packages the same comparison runs live at the published size.
"""

import jax
import numpy as np
import pytest

from dalle_jax.convert.inception import convert
from dalle_jax.models import inception
from tests.support import GOLDEN
from tests.support.inception_weights import import_torchvision, state_dict
from tests.support.parameters import assert_near

GOLDEN_FILE = GOLDEN / "inception.npz"
SIZE = 123  # the last grid is 2 x 2, where all kinds of pools differ
TOLERANCE = 1e-4  # relative to the largest value: float32 through 48 layers, another order of summation


def pictures(side: int, count: int = 2) -> np.ndarray:
    """uint8 noise of two coarsenesses [count, side, side, 3]."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 192, (count, side // 8 + 1, side // 8 + 1, 3)).repeat(8, 1).repeat(8, 2)[:, :side, :side]
    return (coarse + rng.integers(0, 64, (count, side, side, 3))).astype(np.uint8)


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
    return pool3, logits - state_dict(pools)["fc.bias"] if pools == "fid" else logits


def scaled(images_uint8):
    return images_uint8.astype(np.float32) / 127.5 - 1


@pytest.fixture(scope="module", params=inception.CLASSES)
def ours(request):
    """Pools, definition, parameters and compiled features of a network with seeded weights."""
    config, params = convert(state_dict(request.param))
    model = inception.model(config)
    return request.param, model, params, jax.jit(model.apply)


def test_golden_numbers(ours):
    pools, model, params, features = ours
    got = features(params, scaled(pictures(SIZE)))
    with np.load(GOLDEN_FILE) as golden:
        want = golden[f"{pools}:pool3"], golden[f"{pools}:logits"]
    assert want[0].shape == (2, 2_048) and want[1].shape == (2, inception.CLASSES[pools])
    assert np.abs(want[0][0] - want[0][1]).max() > 100 * TOLERANCE * np.abs(want[0]).max()  # pictures tell apart
    assert_near(map(np.asarray, got), as_ours(pools, *want), TOLERANCE)


def test_every_name_of_the_pools_matters():
    """The golden numbers of the two networks differ by their pools alone, far beyond the tolerance."""
    with np.load(GOLDEN_FILE) as golden:
        fid, other = golden["fid:pool3"], golden["torchvision:pool3"]
    assert np.abs(fid - other).max() > 100 * TOLERANCE * np.abs(fid).max()


def test_pytorch_and_jax_agree_at_the_published_size(ours):
    pools, model, params, features = ours
    x_BHWC = scaled(pictures(inception.SIZE, 1))
    want = reference(pools, state_dict(pools), x_BHWC)
    assert_near(map(np.asarray, features(params, x_BHWC)), as_ours(pools, *want), TOLERANCE)


def test_the_golden_file_is_what_pytorch_gives():
    with np.load(GOLDEN_FILE) as golden:
        for pools in inception.CLASSES:
            want = reference(pools, state_dict(pools), scaled(pictures(SIZE)))
            assert_near((golden[f"{pools}:pool3"], golden[f"{pools}:logits"]), want, TOLERANCE)


def test_a_pool_averages_what_is_inside_the_picture():
    x = np.arange(1.0, 10).reshape(1, 3, 3, 1).astype(np.float32)
    assert inception._mean(x)[0, 0, 0, 0] == (1 + 2 + 4 + 5) / 4 and inception._mean(x)[0, 1, 1, 0] == 5
    assert inception._mean_with_padding(x)[0, 0, 0, 0] == np.float32((1 + 2 + 4 + 5) / 9)
    assert inception._same_max(-x)[0, 2, 2, 0] == -5  # padding is no zero
    assert inception._halving_max(x).shape == (1, 1, 1, 1) and inception._halving_max(x)[0, 0, 0, 0] == 9


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
        pool3, logits = reference(pools, state_dict(pools), scaled(pictures(SIZE)))
        arrays |= {f"{pools}:pool3": pool3, f"{pools}:logits": logits}
    np.savez_compressed(GOLDEN_FILE, **arrays)
    print(GOLDEN_FILE, GOLDEN_FILE.stat().st_size, "bytes")
