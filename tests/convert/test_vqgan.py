"""VQGANs of taming-transformers and LlamaGen give the numbers of the original code.

The numbers below are what both original codes made, in PyTorch, of weights that a formula gives; they may never change.
With PyTorch and taming-transformers installed (`taming-transformers-rom1504`, its modules alone), random weights are
compared too, also of a Gumbel VQGAN.
"""

import argparse
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dalle_jax import model_dir
from dalle_jax.cli import main
from dalle_jax.convert import vqgan, weights
from dalle_jax.errors import UserError
from dalle_jax.models import image_tokenizer
from dalle_jax.models.vq.config import VQConfig
from dalle_jax.models.vq.model import model as vq_model
from tests.support import formula_weights
from tests.support.parameters import assert_every_weight_matters

SIDE = 32
SIZES = {
    "image_size": SIDE, "vocab": 64, "width": 32, "multipliers": (1, 2), "blocks": 1, "latent": 16,
    "attention_levels": (1,),
}  # fmt: skip
LAYOUT_SIZES = {"taming": {"code_dim": 16}, "llamagen": {"code_dim": 8, "unit_codes": True}}
TOLERANCE = 1e-4  # the published numbers have five digits


def torch_shapes(config, layout):
    """Name -> shape in PyTorch, from the names that the importer knows."""
    shapes = {}
    for path, name in vqgan.names(config, layout).items():
        leaf = vq_model(config).abstract
        for key in path:
            leaf = leaf[key]
        shapes[name] = tuple(leaf.shape[i] for i in (3, 2, 0, 1)) if leaf.ndim == 4 else leaf.shape
    return shapes


def state_of(layout):
    config = VQConfig(**SIZES, **LAYOUT_SIZES[layout])
    return config, formula_weights.weights(torch_shapes(config, layout))


@pytest.fixture(scope="module", params=["taming", "llamagen"])
def small(request):
    """Layout, config, state dict."""
    return request.param, *state_of(request.param)


def outputs(model, params, x_BHWC):
    """Vectors, image tokens and reconstruction, as PyTorch lays them out."""

    @jax.jit
    def run(params, x_BHWC):
        tokens_BRC = model.apply(params, x_BHWC, method="encode_tokens")
        decoded = model.apply(params, tokens_BRC, method="decode_tokens")
        return model.apply(params, x_BHWC, method="encode"), tokens_BRC, decoded

    z_BRCD, tokens_BRC, y_BHWC = map(np.asarray, run(params, x_BHWC))
    return z_BRCD.transpose(0, 3, 1, 2), tokens_BRC, y_BHWC.transpose(0, 3, 1, 2)


# First four values, the last, mean and standard deviation, of the vectors before the codes and of the reconstruction.
NUMBERS = {
    "taming": (
        ((1, 16, 16, 16), [0.47071, -0.74378, -0.18017, -1.50441, 0.11327, 0.027203, 0.558895]),
        [8, 55, 29, 40, 11, 44, 7, 29, 39, 46, 51, 45],
        ((1, 3, 32, 32), [0.01427, -0.12347, 0.01178, 0.32712, -0.28671, 0.069537, 0.599062]),
    ),
    "llamagen": (
        ((1, 8, 16, 16), [-0.92363, -0.19592, -1.54843, -0.33468, 0.2502, 0.190860, 0.640390]),
        [8, 39, 8, 58, 51, 8, 58, 58, 58, 58, 8, 58],
        ((1, 3, 32, 32), [0.15006, -0.02473, -0.37351, -0.28316, 0.13942, 0.079683, 0.577854]),
    ),
}


def test_the_formula_is_the_published_one():
    np.testing.assert_allclose(
        formula_weights.uniform(0, 4), [-0.97596601, -0.70423032, 0.39582486, -0.73580210], atol=2e-7
    )
    np.testing.assert_allclose(formula_weights.uniform(1000, 2), [-0.76756269, -0.81870067], atol=2e-7)


def test_formula_weights_give_the_numbers_of_the_original_code(small):
    layout, config, state = small
    assert len(state) == 155
    found, params = vqgan.convert(state, layout, image_size=SIDE)
    assert found == config
    z, tokens, y = outputs(vq_model(config), params, formula_weights.image(1, SIDE))
    (z_shape, z_numbers), first_tokens, (y_shape, y_numbers) = NUMBERS[layout]
    assert tokens.dtype == np.int32 and tokens.shape == (1, 16, 16)
    assert tokens.ravel()[:12].tolist() == first_tokens
    for array, shape, numbers in ((z, z_shape, z_numbers), (y, y_shape, y_numbers)):
        assert array.shape == shape and array.dtype == np.float32
        measured = [*array.ravel()[:4], array.ravel()[-1], array.mean(), array.std()]
        np.testing.assert_allclose(measured, numbers, atol=TOLERANCE)


def test_the_numbers_depend_on_every_weight():
    """So that the comparison above cannot miss an array that is mislaid. Left out are biases that cannot matter: a
    softmax takes out a key's, and a norm with one channel in a group, as at 32 channels, takes out constants: those
    that enter it alone, and in the decoder's finest level, which ends with a norm, all."""
    config, state = state_of("taming")
    model, params = vq_model(config), vqgan.convert(state, "taming", image_size=SIDE)[1]
    x, tokens = formula_weights.image(1, SIDE), np.arange(256).reshape(1, 16, 16) % 64
    leaves, tree = jax.tree.flatten(params)
    paths = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    constants = r".*key/bias|decoder/level_0_block_\d/\w+/bias|encoder/level_0_block_0/conv_1/bias"
    idle = [bool(re.fullmatch(constants, path)) and "norm" not in path for path in paths]
    assert sum(idle) == 5 + 5 + 1

    @jax.jit
    def both(some):
        some = iter(some)
        whole = [leaf if out else next(some) for leaf, out in zip(leaves, idle, strict=True)]
        params = jax.tree.unflatten(tree, whole)
        return model.apply(params, x, method="encode"), model.apply(params, tokens, method="decode_tokens")

    used = [leaf for leaf, out in zip(leaves, idle, strict=True) if not out]
    assert_every_weight_matters(both, used, 10 * TOLERANCE)


def published_sizes():
    f8 = {"multipliers": (1, 2, 2, 4), "attention_levels": (3,)}
    unit = {"code_dim": 8, "unit_codes": True}
    return [("taming", {}, 76_073_859), ("llamagen", unit, 71_883_403), ("llamagen", unit | f8, 70_109_835)]


@pytest.mark.parametrize(("layout", "sizes", "count"), published_sizes())
def test_published_models_have_their_published_sizes(layout, sizes, count):
    """76.07, 71.88 and 70.11 million; sizes are found from the shapes alone."""
    config = VQConfig(**sizes)
    shapes = torch_shapes(config, layout)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count == vq_model(config).num_params
    described = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    assert vqgan._infer_config(described, layout, image_size=256, pixel_range="symmetric") == config


def test_names_and_shapes_are_those_of_the_published_files():
    config = VQConfig()
    shapes = torch_shapes(config, "taming")
    for name, shape in {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.4.attn.1.proj_out.weight": (512, 512, 1, 1),
        "encoder.down.3.downsample.conv.bias": (256,),
        "encoder.mid.attn_1.norm.weight": (512,),
        "encoder.conv_out.weight": (256, 512, 3, 3),
        "decoder.conv_in.weight": (512, 256, 3, 3),
        "decoder.up.4.attn.2.q.weight": (512, 512, 1, 1),
        "decoder.up.4.block.0.conv1.weight": (512, 512, 3, 3),
        "decoder.up.1.upsample.conv.weight": (128, 128, 3, 3),
        "decoder.norm_out.bias": (128,),
        "quantize.embedding.weight": (16_384, 256),
        "post_quant_conv.weight": (256, 256, 1, 1),
    }.items():
        assert shapes.pop(name) == shape
    assert "encoder.down.4.downsample.conv.weight" not in shapes and "decoder.up.0.upsample.conv.weight" not in shapes
    shapes = torch_shapes(VQConfig(code_dim=8, unit_codes=True), "llamagen")
    for name, shape in {
        "encoder.conv_blocks.4.attn.1.q.weight": (512, 512, 1, 1),
        "encoder.mid.0.norm1.weight": (512,),
        "decoder.conv_blocks.0.attn.2.v.weight": (512, 512, 1, 1),
        "decoder.conv_blocks.0.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.conv_blocks.4.res.2.conv2.weight": (128, 128, 3, 3),
        "quantize.embedding.weight": (16_384, 8),
        "quant_conv.weight": (8, 256, 1, 1),
    }.items():
        assert shapes.pop(name) == shape
    gumbel = torch_shapes(VQConfig(vocab=8_192, quantizer="gumbel"), "taming")
    assert gumbel["quantize.proj.weight"] == (8_192, 256, 1, 1) and gumbel["quantize.embed.weight"] == (8_192, 256)


def test_what_only_training_needs_is_left_out():
    config, state = state_of("llamagen")
    extra = {"loss.discriminator.main.0.weight": np.zeros((4, 3, 4, 4)), "quantize.codebook_used": np.zeros(65_536)}
    params = vqgan.convert(state | extra, "llamagen", image_size=SIDE)[1]
    same = vqgan.convert(state, "llamagen", image_size=SIDE)[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, params, same))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("decoder.up.1.block.1.conv2.bias"), "decoder.up.1.block.1.conv2.bias is missing: fetch"),
        (lambda s: [s.pop(n) for n in list(s) if n.startswith("decoder.up.0")], "and 17 more are missing"),
        (lambda s: s.pop("encoder.conv_in.weight"), "'encoder.conv_in.weight' is missing"),
        (lambda s: s.pop("quantize.embedding.weight"), "'quantize.embedding.weight' is missing"),
        (lambda s: s.clear(), "encoder.down.0.block.0.conv1.weight"),
        (lambda s: s.update({"first_stage.x": np.zeros(3)}), "first_stage.x is there too: remove"),
        (lambda s: s.update({"quant_conv.bias": np.zeros(7)}), r"quant_conv.bias of shape \(16,\), got \(7,\)"),
        (
            lambda s: s.update({"decoder.conv_in.weight": s["decoder.conv_in.weight"].swapaxes(0, 1)}),
            r"decoder.conv_in.weight of shape \(64, 16, 3, 3\), got \(16, 64, 3, 3\)",
        ),
        (lambda s: s.update({"quant_conv.bias": np.full(16, np.nan)}), "expected finite weights"),
        (lambda s: s.update({"encoder.conv_in.weight": np.zeros((24, 3, 3, 3))}), "do not make a VQGAN"),
    ],
)
def test_wrong_state_dicts_are_refused(damage, message):
    state = dict(state_of("taming")[1])
    damage(state)
    with pytest.raises(UserError, match=message):
        vqgan.convert(state, "taming", image_size=SIDE)


def test_the_other_layout_and_an_impossible_image_size_are_refused():
    state = state_of("taming")[1]
    with pytest.raises(UserError, match="in llamagen's names, but 'encoder.conv_blocks.0.res.0.conv1.weight'"):
        vqgan.convert(state, "llamagen")
    with pytest.raises(UserError, match="multiple of the stride 2"):
        vqgan.convert(state, "taming", image_size=33)


@pytest.mark.parametrize(("family", "layout"), [("taming", "taming"), ("llamagen-vq", "llamagen")])
def test_a_file_through_the_command(family, layout, tmp_path, capsys):
    """Needs no PyTorch; what is written is an image tokenizer that loads."""
    config, state = state_of(layout)
    save_file(state, tmp_path / "vq.safetensors")
    words = ["convert", family, f"{tmp_path}/vq.safetensors"]
    assert main.main([*words, f"--out={tmp_path}/out", f"--image-size={SIDE}"]) == 0
    assert f"64 nearest codes of {config.code_dim}, 16 x 16 grid" in capsys.readouterr().out
    assert model_dir.load(tmp_path / "out", image_tokenizer.NAMES).model.config == config
    assert main.main([*words, f"--out={tmp_path}/more", "--image-size=33"]) == 2
    assert "multiple of the stride 2" in capsys.readouterr().err
    assert main.main([*words, f"--out={tmp_path}/more", "--image-size=0"]) == 2
    assert "expected --image-size to be a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_a_checkpoint_of_a_training_has_the_state_dict_inside(key, tmp_path):
    torch = pytest.importorskip("torch", reason="writing a .ckpt takes PyTorch: pip install torch")
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    torch.save({key: tensors, "epoch": 3, "optimizer": {"state": {0: torch.ones(1)}}}, tmp_path / "last.ckpt")
    assert {name: np.asarray(array).tolist() for name, array in weights.read(tmp_path / "last.ckpt").items()} == {
        "a": [1, 1],
        "b": [0, 0, 0],
    }


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickled_checkpoint_gives_the_same_folder(archive, tmp_path):
    torch = pytest.importorskip("torch", reason="writing a .ckpt takes PyTorch: pip install torch")
    state = state_of("taming")[1]
    save_file(state, tmp_path / "vq.safetensors")
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    extras = {"epoch": 3, "hyper_parameters": argparse.Namespace(lr=1.0)}
    torch.save({"state_dict": tensors, **extras}, tmp_path / "vq.ckpt", _use_new_zipfile_serialization=archive)
    digests = []
    for file in ("vq.safetensors", "vq.ckpt"):
        words = ["convert", "taming", f"{tmp_path}/{file}", f"--out={tmp_path}/{file}.out", f"--image-size={SIDE}"]
        assert main.main(words) == 0
        digests.append(model_dir.load(tmp_path / f"{file}.out").digest)
    assert digests[0] == digests[1]


def original(sizes: dict, *, quantizer: str, seed: int = 0):
    """taming's encoder, codebook and decoder with random weights, in PyTorch, as its VQModel and GumbelVQ join them."""
    why = "the comparison takes PyTorch and taming's modules: pip install --no-deps taming-transformers-rom1504"
    torch = pytest.importorskip("torch", reason=why)
    networks = pytest.importorskip("taming.modules.diffusionmodules.model", reason=why)
    quantizers = pytest.importorskip("taming.modules.vqvae.quantize", reason=why)
    torch.manual_seed(seed)
    common = dict(in_channels=3, out_ch=3, double_z=False, z_channels=24, resolution=sizes["resolution"], dropout=0.0)
    settings = common | sizes
    vocab, code_dim = 48, 24 if quantizer == "gumbel" else 16
    parts = {
        "encoder": networks.Encoder(**settings),
        "decoder": networks.Decoder(**settings),
        "quantize": quantizers.GumbelQuantize(24, code_dim, n_embed=vocab)
        if quantizer == "gumbel"
        else quantizers.VectorQuantizer2(vocab, code_dim, beta=0.25),
        "quant_conv": torch.nn.Conv2d(24, code_dim, 1),
        "post_quant_conv": torch.nn.Conv2d(code_dim, 24, 1),
    }
    module = torch.nn.ModuleDict(parts).eval()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            elif name == "quantize.embedding.weight":  # its own are so small that all pictures would look alike
                weight.normal_()
    return module


@pytest.mark.parametrize(
    ("quantizer", "sizes", "shape"),
    [
        pytest.param(
            "nearest",
            {"ch_mult": (1, 1, 2, 2, 4), "attn_resolutions": [4], "resolution": 64},
            (1, 64, 64, 3),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "nearest",
            {"ch_mult": (1, 2), "attn_resolutions": [], "num_res_blocks": 2, "resolution": 32},
            (2, 16, 40, 3),
            marks=pytest.mark.slow,
        ),
        ("gumbel", {"ch_mult": (1, 1, 2, 4), "attn_resolutions": [8, 16], "resolution": 64}, (1, 64, 32, 3)),
    ],
)
def test_pytorch_and_jax_agree(quantizer, sizes, shape):
    """Also on rectangles; one difference of two nearly equal distances would not be forgiven, and there is none."""
    module = original({"ch": 32, "num_res_blocks": 1} | sizes, quantizer=quantizer)
    import torch

    state = {name: value.numpy() for name, value in module.state_dict().items()}
    config, params = vqgan.convert(state, "taming", image_size=sizes["resolution"])
    first = len(sizes["ch_mult"]) - 1
    levels = {int(np.log2(sizes["resolution"] // side)) for side in sizes["attn_resolutions"]}
    assert (config.multipliers, set(config.attention_levels)) == (sizes["ch_mult"], levels)
    assert config.stride == 2**first and config.quantizer == quantizer
    x_BHWC = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    model = vq_model(config)
    with torch.no_grad():
        z = module["quant_conv"](module["encoder"](torch.from_numpy(x_BHWC).permute(0, 3, 1, 2)))
        if quantizer == "gumbel":
            z = module["quantize"].proj(z)
            tokens = z.argmax(1)
            q = module["quantize"].embed.weight[tokens].permute(0, 3, 1, 2)
        else:
            q, _, (_, _, tokens) = module["quantize"](z)
            tokens = tokens.reshape(len(z), *z.shape[2:])
        y = module["decoder"](module["post_quant_conv"](q))
    got_z, got_tokens, got_y = outputs(model, params, x_BHWC)
    np.testing.assert_array_equal(got_tokens, tokens.numpy())
    for got, want in ((got_z, z.numpy()), (got_y, y.numpy())):
        assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()
