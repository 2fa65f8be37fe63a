"""The released dVAE's weights give the released module's numbers.

The golden file holds a tiny module's weights (random, rounded to float16), an image and what the module made of them in
PyTorch; it was written by `python -m tests.convert.test_openai_dvae` and may change only with the shapes chosen here.
With PyTorch and the package DALL-E installed, the same comparison runs live, and the file itself is checked too.
"""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dalle_jax import model_dir, pixels
from dalle_jax.cli import main
from dalle_jax.convert import openai_dvae
from dalle_jax.errors import UserError
from dalle_jax.models import dvae
from dalle_jax.models.layers import Model
from tests.support import GOLDEN
from tests.support.parameters import assert_every_weight_matters, assert_near

GOLDEN_FILE = GOLDEN / "openai_dvae.npz"
SIZES = {"n_hid": 8, "vocab_size": 24}
STEM, IMAGE_SIZE = 8, 32
TOLERANCE = 1e-4  # relative to the largest value: float32, another order of summation


def reference(seed: int = 0, blocks: int = 1):
    """The released modules at SIZES with random weights: (encoder, decoder), torch.

    Weights of the residual branches are doubled and biases are not zero, so that none can be mislaid unseen.
    """
    why = "the comparison takes PyTorch and the package DALL-E: pip install 'dalle-jax[convert]' DALL-E"
    torch = pytest.importorskip("torch", reason=why)
    dall_e = pytest.importorskip("dall_e", reason=why)
    import attr

    torch.manual_seed(seed)
    with attr.validators.disabled():  # they refuse anything this small
        encoder = dall_e.Encoder(n_blk_per_group=blocks, **SIZES)
        decoder = dall_e.Decoder(n_blk_per_group=blocks, n_init=STEM, **SIZES)
    with torch.no_grad():
        for name, weight in (*encoder.named_parameters(), *decoder.named_parameters()):
            if weight.ndim == 1:
                weight.normal_(std=0.3)
            elif "res_path" in name:
                weight.mul_(2.0)
            weight.copy_(weight.half().float())
    return encoder, decoder


def state_arrays(module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in module.state_dict().items()}


def torch_outputs(encoder, decoder, image_uint8):
    """Logits and decoder outputs of the most likely codes, channels last."""
    import torch
    from dall_e import map_pixels

    with torch.no_grad():
        image = torch.from_numpy(image_uint8).permute(0, 3, 1, 2).float() / 255
        logits = encoder(map_pixels(image))
        one_hot = torch.nn.functional.one_hot(logits.argmax(1), SIZES["vocab_size"]).permute(0, 3, 1, 2).float()
        output = decoder(one_hot)
    return logits.permute(0, 2, 3, 1).numpy(), output.permute(0, 2, 3, 1).numpy()


def our_outputs(encoder_state, decoder_state, image_uint8):
    config, params = openai_dvae.convert(encoder_state, decoder_state, image_size=IMAGE_SIZE)
    model = dvae.model(config)
    logits = encode(model, params, image_uint8)
    one_hot = np.eye(config.vocab, dtype=np.float32)[logits.argmax(-1)]
    return logits, np.asarray(apply(model, params, one_hot, method="decode"))


apply = jax.jit(Model.apply, static_argnums=0, static_argnames="method")


def encode(model, params, image_uint8):
    return np.asarray(apply(model, params, pixels.to_laplace(pixels.to_unit(image_uint8)), method="encode"))


def some_image(height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN_FILE) as file:
        arrays = dict(file)
    parts = {"encoder": {}, "decoder": {}}
    for name in list(arrays):
        part, _, rest = name.partition(":")
        if part in parts:
            parts[part][rest] = arrays.pop(name).astype(np.float32)
    return arrays | parts


def test_golden_weights_give_the_golden_numbers(golden):
    got = our_outputs(golden["encoder"], golden["decoder"], golden["image"])
    assert_near(got, (golden["logits"], golden["output"]), TOLERANCE)


def test_the_golden_numbers_depend_on_every_weight(golden):
    """So that the comparison above cannot miss an array that is mislaid: half a deviation shows."""
    config, params = openai_dvae.convert(golden["encoder"], golden["decoder"], image_size=IMAGE_SIZE)
    model = dvae.model(config)
    x = pixels.to_laplace(pixels.to_unit(golden["image"]))
    codes = jax.nn.one_hot(golden["logits"].argmax(-1), config.vocab)

    @jax.jit
    def both(params):
        return model.apply(params, x, method="encode"), model.apply(params, codes, method="decode")

    assert_every_weight_matters(both, params, 10 * TOLERANCE)


@pytest.mark.parametrize("size", [(IMAGE_SIZE, IMAGE_SIZE), (16, 40)])
def test_pytorch_and_jax_agree(size):
    encoder, decoder = reference(seed=1, blocks=2)
    image = some_image(*size)
    got = our_outputs(state_arrays(encoder), state_arrays(decoder), image)
    assert_near(got, torch_outputs(encoder, decoder, image), TOLERANCE)


def test_the_golden_file_is_what_pytorch_gives(golden):
    encoder, decoder = reference()
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        for key, array in state_arrays(module).items():
            np.testing.assert_array_equal(golden[name][key], array)
    want = torch_outputs(encoder, decoder, golden["image"])
    assert_near((golden["logits"], golden["output"]), want, TOLERANCE)


def test_safetensors_through_the_command(golden, tmp_path, capsys):
    """Needs no PyTorch; what is written is a model directory that loads."""
    for part in ("encoder", "decoder"):
        save_file(golden[part], tmp_path / f"{part}.safetensors")
    words = [f"--{part}={tmp_path}/{part}.safetensors" for part in ("encoder", "decoder")]
    assert main.main(["convert", "openai-dvae", *words, f"--out={tmp_path}/out", f"--image-size={IMAGE_SIZE}"]) == 0
    assert "24 codes" in capsys.readouterr().out
    assert main.main(["convert", "openai-dvae", *words, f"--out={tmp_path}/more", "--image-size=99999999"]) == 2
    assert "expected --image-size to be a whole number" in capsys.readouterr().err
    found = model_dir.load(tmp_path / "out")
    assert_near([encode(found.model, found.params, golden["image"])], [golden["logits"]], TOLERANCE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e, d: d.pop("blocks.group_2.block_1.id_path.w"), "decoder.blocks.group_2.block_1.id_path.w is missing"),
        (lambda e, d: d.update({"blocks.extra.w": np.zeros(3)}), "extra"),
        (lambda e, d: d.update({"blocks.output.conv.w.x": np.zeros(3)}), "conv.w.x"),
        (
            lambda e, d: e.update({"blocks.output.conv.b": np.zeros(7)}),
            r"encoder.blocks.output.conv.b of shape \(24,\), got \(7,\)",
        ),
        (lambda e, d: e.pop("blocks.input.w"), "blocks.input.w"),
        (lambda e, d: e.clear(), "blocks"),
        (lambda e, d: e.update({"blocks.output.conv.b": np.full(24, np.nan)}), "expected finite weights"),
    ],
)
def test_wrong_state_dicts_are_refused(golden, damage, message):
    encoder, decoder = dict(golden["encoder"]), dict(golden["decoder"])
    damage(encoder, decoder)
    with pytest.raises(UserError, match=message):
        openai_dvae.convert(encoder, decoder, image_size=IMAGE_SIZE)


if __name__ == "__main__":
    encoder, decoder = reference()
    image = some_image()
    logits, output = torch_outputs(encoder, decoder, image)
    weights = {f"encoder:{name}": array.astype(np.float16) for name, array in state_arrays(encoder).items()}
    weights |= {f"decoder:{name}": array.astype(np.float16) for name, array in state_arrays(decoder).items()}
    GOLDEN_FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN_FILE, image=image, logits=logits, output=output, **weights)
    print(GOLDEN_FILE, GOLDEN_FILE.stat().st_size, "bytes")
