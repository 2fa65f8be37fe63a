"""LPIPS gives the numbers of taming-transformers' copy of it, and its published files become a folder.

The golden numbers are what that code made of formula weights and pictures on a CPU (`whole_original`); they may change
with those alone. With PyTorch and taming-transformers-rom1504 installed the comparison runs live.
"""

import functools
import importlib
import sys
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dalle_jax import model_dir
from dalle_jax.cli import main
from dalle_jax.convert import lpips as importer
from dalle_jax.errors import UserError
from dalle_jax.models import lpips
from tests.support import formula_weights, lpips_weights

GOLDEN = (0.13819216, 0.13959506)
TOLERANCE = 1e-4  # relative: float32 through 13 layers in another order of summation
PIXELS = 32


def pairs():
    """Two pairs of pictures in [-1, 1]."""
    return tuple(np.concatenate([formula_weights.image(k, PIXELS) for k in ks]) for ks in ((1, 2), (3, 4)))


def whole_original(monkeypatch, state):
    """taming's LPIPS with these weights; torchvision, of which it takes the layers of VGG16, is stood in for."""
    why = (
        "the comparison takes PyTorch and taming: pip install torch; pip install --no-deps taming-transformers-rom1504"
    )
    torch = pytest.importorskip("torch", reason=why)
    pytest.importorskip("taming", reason=why)

    def vgg16(pretrained):
        layers, inputs = [], 3
        for width, count in lpips_weights.WIDTHS:
            for _ in range(count):
                layers += [torch.nn.Conv2d(inputs, width, 3, padding=1), torch.nn.ReLU(inplace=True)]
                inputs = width
            layers.append(torch.nn.MaxPool2d(2))
        return types.SimpleNamespace(features=torch.nn.Sequential(*layers))

    torchvision = types.ModuleType("torchvision")
    torchvision.models = types.SimpleNamespace(vgg16=vgg16)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    theirs = importlib.import_module("taming.modules.losses.lpips").LPIPS
    monkeypatch.setattr(theirs, "load_from_pretrained", lambda self: None)  # it would fetch the published file
    network = theirs().eval()
    found = network.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=False)
    assert not found.unexpected_keys and all(key.startswith("scaling_layer") for key in found.missing_keys)

    def distance(x_BHWC, y_BHWC):
        with torch.no_grad():
            x, y = (torch.from_numpy(z.transpose(0, 3, 1, 2).copy()) for z in (x_BHWC, y_BHWC))
            return network(x, y).numpy().ravel()

    return distance


@pytest.fixture(scope="module")
def converted():
    config, params = importer.convert(lpips_weights.state_dict())
    return lpips.model(config), params


def test_golden_numbers(converted):
    model, params = converted
    x_BHWC, y_BHWC = pairs()
    measure = jax.jit(functools.partial(lpips.distance, model))
    np.testing.assert_allclose(measure(params, (x_BHWC + 1) / 2, (y_BHWC + 1) / 2), GOLDEN, rtol=TOLERANCE)
    np.testing.assert_array_equal(measure(params, x_BHWC, x_BHWC), np.zeros(2))


def test_the_golden_numbers_are_tamings(monkeypatch):
    distance = whole_original(monkeypatch, lpips_weights.state_dict())
    np.testing.assert_allclose(distance(*pairs()), GOLDEN, rtol=TOLERANCE)


def test_two_files_and_one_give_the_same_folder(tmp_path, capsys, converted):
    network, linear = lpips_weights.two_files()
    classifier = {"classifier.0.weight": np.zeros((4, 4), np.float32)}
    save_file(network | classifier, tmp_path / "vgg16.safetensors")
    save_file(linear, tmp_path / "vgg.safetensors")
    scaling = {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)}
    save_file(lpips_weights.state_dict() | scaling, tmp_path / "whole.safetensors")
    for words in (["vgg16.safetensors", "vgg.safetensors"], ["whole.safetensors"]):
        out = tmp_path / words[0].removesuffix(".safetensors")
        assert main.main(["convert", "lpips", *(f"{tmp_path}/{word}" for word in words), "--out", str(out)]) == 0
        found = model_dir.load(out, model_dir.ROLES["lpips"])
        assert jax.tree.all(jax.tree.map(np.array_equal, found.params, converted[1]))
        assert "14,716,160 parameters" in capsys.readouterr().out  # 14,714,688 of VGG16's features and 1,472


def test_a_network_without_linear_weights_and_others_are_refused():
    network, linear = lpips_weights.two_files()
    for state, message in (
        (network, "no linear1/weight: give vgg.pth"),
        (linear, "no conv1_1/weight: give torchvision"),
        ({k: v for k, v in {**network, **linear}.items() if k != "features.28.bias"}, "conv5_3/bias"),
        ({**network, **linear, "features.0.bias": np.full(64, np.nan)}, "conv1_1/bias"),
        ({**network, **linear, "lin2.model.1.weight": np.ones((1, 7, 1, 1))}, "linear3/weight"),
    ):
        with pytest.raises(UserError, match=message):
            importer.convert(state)
