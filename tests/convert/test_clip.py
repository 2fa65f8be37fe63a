"""Published CLIP weights give the features of the package transformers' CLIPModel.

The golden file holds a tiny model's weights (random, rounded to float16), pictures, captions and what CLIPModel made of
them in PyTorch; it was written by `python -m tests.convert.test_clip` and may change only with the shapes chosen
here. With PyTorch and transformers installed the same comparison runs live, and the file itself is checked too.
"""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dalle_jax import model_dir
from dalle_jax.cli import main
from dalle_jax.convert.clip import convert, read_settings
from dalle_jax.errors import UserError
from dalle_jax.models import clip
from tests.support import GOLDEN
from tests.support.clip_vocabulary import generated, write_merge_list, write_vocab
from tests.support.parameters import assert_every_weight_matters, assert_near

GOLDEN_FILE = GOLDEN / "hf_clip.npz"
VOCAB = 20  # entries, then the two marks
TEXT = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
TEXT |= {"vocab_size": VOCAB + 2, "max_position_embeddings": 7, "bos_token_id": VOCAB, "eos_token_id": VOCAB + 1}
VISION = {"hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 3, "num_hidden_layers": 2}
VISION |= {"image_size": 12, "patch_size": 4}
HEADS = {"image_heads": 3, "text_heads": 2}
TOLERANCE = 1e-4


def reference(seed: int = 0):
    """CLIPModel of these sizes, every weight random, so that none can be mislaid unseen."""
    why = "the comparison takes PyTorch and transformers: pip install 'dalle-jax[convert]' transformers"
    torch = pytest.importorskip("torch", reason=why)
    transformers = pytest.importorskip("transformers", reason=why)
    torch.manual_seed(seed)
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=10)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "layrnorm" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
            elif name != "logit_scale":
                weight.normal_(std=0.3)
            weight.copy_(weight.half().float())
    return model


def state_arrays(model) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def inputs(seed: int = 0):
    """Normalised pixels, and text positions of several lengths with anything behind the end mark."""
    rng = np.random.default_rng(seed)
    pixel_BHWC = rng.normal(size=(3, 12, 12, 3)).astype(np.float32)
    text_BT = rng.integers(VOCAB, size=(3, 7)).astype(np.int32)
    text_BT[:, 0] = VOCAB
    for row, end in enumerate((6, 3, 1)):
        text_BT[row, end] = VOCAB + 1
    return pixel_BHWC, text_BT


def torch_features(model, pixel_BHWC, text_BT):
    """Unit image and text vectors, and the logits of pictures by captions."""
    import torch

    with torch.no_grad():
        pixels = torch.from_numpy(pixel_BHWC).permute(0, 3, 1, 2)
        out = model(pixel_values=pixels, input_ids=torch.from_numpy(text_BT).long())
    return out.image_embeds.numpy(), out.text_embeds.numpy(), out.logits_per_image.numpy()


def our_features(state, pixel_BHWC, text_BT):
    config, params = convert(state, **HEADS)
    image_BE, text_BE, scale = clip.model(config).apply(params, pixel_BHWC, text_BT)
    return np.asarray(image_BE), np.asarray(text_BE), np.asarray(scale * image_BE @ text_BE.T)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN_FILE) as file:
        arrays = dict(file)
    state = {name.removeprefix("state:"): a.astype(np.float32) for name, a in arrays.items() if ":" in name}
    return state, arrays


def openai_names(state) -> dict[str, np.ndarray]:
    """The same weights as OpenAI's module keeps them."""
    top = {
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
        "input_resolution": np.int64(12),
        "context_length": np.int64(7),
        "vocab_size": np.int64(VOCAB + 2),
    }
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    norms |= {"ln_final": "text_model.final_layer_norm"}
    for tower, theirs in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for i in range(2):
            ours, hf = f"{tower}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                parts = [state[f"{hf}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                top[f"{ours}.attn.in_proj_{kind}"] = np.concatenate(parts)
            norms |= {f"{ours}.attn.out_proj": f"{hf}.self_attn.out_proj"}
            norms |= {f"{ours}.mlp.c_fc": f"{hf}.mlp.fc1", f"{ours}.mlp.c_proj": f"{hf}.mlp.fc2"}
            norms |= {f"{ours}.ln_{n}": f"{hf}.layer_norm{n}" for n in (1, 2)}
    pairs = {f"{a}.{kind}": state[f"{b}.{kind}"] for a, b in norms.items() for kind in ("weight", "bias")}
    return {name: np.ascontiguousarray(array) for name, array in (top | pairs).items()}


def test_golden_weights_give_the_golden_features(golden):
    state, arrays = golden
    got = our_features(state, arrays["pixels"], arrays["text"])
    assert_near(got, [arrays[name] for name in ("image", "captions", "logits")], TOLERANCE)


def test_the_golden_features_depend_on_every_weight(golden):
    """So that the comparison above cannot miss an array that is mislaid: half a deviation shows.

    The biases of keys alone change nothing, as they add the same to all scores of a query; those of queries and values
    lie in the same array.
    """
    state, arrays = golden
    config, params = convert(state, **HEADS)
    model = clip.model(config)

    features = jax.jit(lambda p: model.apply(p, arrays["pixels"], arrays["text"]))
    assert_every_weight_matters(features, params, 10 * TOLERANCE, min_change=0.1)


def test_openai_names_are_the_same_model(golden):
    state, _ = golden
    ours, theirs = (convert(names, **HEADS) for names in (state, openai_names(state)))
    assert ours[0] == theirs[0]
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])


@pytest.mark.parametrize("seed", [0, 1])
def test_pytorch_and_jax_agree(golden, seed):
    model = reference(seed)
    state, arrays = state_arrays(model), inputs(seed)
    assert_near(our_features(state, *arrays), torch_features(model, *arrays), TOLERANCE)
    if seed == 0:  # the golden file's
        for name, array in golden[0].items():
            np.testing.assert_array_equal(state[name], array)


def convert_folder(folder, out, *words) -> int:
    return main.main(["convert", "hf-clip", *map(str, (folder, "--out", out, *words))])


def folder_of(golden, folder):
    """As Hugging Face publishes: weights, config, preprocessor and vocabulary, here of as many entries as needed."""
    state, _ = golden
    folder.mkdir()
    merges = generated()[:3]
    write_vocab(folder, merges)
    grown = dict(state)  # a token table that fits a byte-level vocabulary
    table = np.resize(state["text_model.embeddings.token_embedding.weight"], (512 + 3 + 2, 16))
    grown["text_model.embeddings.token_embedding.weight"] = table
    save_file(grown, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"text_config": TEXT, "vision_config": VISION}))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3})
    )
    return folder


def test_a_published_folder_through_the_command(golden, tmp_path, capsys):
    """Needs no PyTorch; what is written is a model directory that loads, tokenizer included."""
    folder = folder_of(golden, tmp_path / "hf")
    assert convert_folder(folder, tmp_path / "out") == 0
    assert "images of 12 pixels in patches of 4, vectors of 10" in capsys.readouterr().out
    found = model_dir.load(tmp_path / "out", name="clip")
    config = found.model.config
    assert (config.image_heads, config.text_heads) == (3, 2)
    assert config.mean == (0.5, 0.4, 0.3) and config.text_vocab == 515


def test_a_tokenizer_of_another_size_is_refused(golden, tmp_path, capsys):
    folder = folder_of(golden, tmp_path / "hf")
    other = write_merge_list(tmp_path / "bpe.txt.gz", generated())
    assert convert_folder(folder, tmp_path / "out", "--tokenizer", other) == 2
    assert "a vocabulary of 515 entries besides the start and end marks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pickled_weights_give_the_same_folder(golden, tmp_path):
    torch = pytest.importorskip("torch", reason="writing a .bin takes PyTorch: pip install torch")
    folder = folder_of(golden, tmp_path / "hf")
    assert convert_folder(folder, tmp_path / "out") == 0
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, folder / "pytorch_model.bin")
    assert convert_folder(folder, tmp_path / "other") == 0
    assert model_dir.load(tmp_path / "out").digest == model_dir.load(tmp_path / "other").digest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("visual_projection.weight"), "visual_projection.weight"),
        (lambda s: s.pop("text_model.encoder.layers.1.mlp.fc2.bias"), "layers.1.mlp.fc2.bias"),
        (lambda s: s.update({"vision_model.extra": np.zeros(3)}), "vision_model.extra"),
        (lambda s: s.update({"text_model.final_layer_norm.bias": np.zeros(7)}), "text/norm_bias"),
        (lambda s: s.update({"vision_model.embeddings.patch_embedding.weight": np.zeros(3)}), "do not make a CLIP"),
        (lambda s: s.clear(), "is missing"),
        (lambda s: s.update({"transformer.resblocks.0.attn.in_proj_weight": np.zeros((4, 4))}), "do not make a CLIP"),
    ],
)
def test_wrong_state_dicts_are_refused(golden, damage, message):
    state = dict(golden[0])
    damage(state)
    with pytest.raises(UserError, match=message):
        convert(state, **HEADS)


def test_models_that_are_computed_otherwise_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_act": "gelu"}}))
    with pytest.raises(UserError, match="expected hidden_act = quick_gelu in text_config"):
        read_settings(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="expected json"):
        read_settings(tmp_path)


if __name__ == "__main__":
    model, (pixel_BHWC, text_BT) = reference(), inputs()
    image, captions, logits = torch_features(model, pixel_BHWC, text_BT)
    weights = {f"state:{name}": array.astype(np.float16) for name, array in state_arrays(model).items()}
    weights["state:logit_scale"] = state_arrays(model)["logit_scale"]
    np.savez_compressed(
        GOLDEN_FILE, pixels=pixel_BHWC, text=text_BT, image=image, captions=captions, logits=logits, **weights
    )
    print(GOLDEN_FILE, GOLDEN_FILE.stat().st_size, "bytes")
