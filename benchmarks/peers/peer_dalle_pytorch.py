"""DALLE-pytorch 1.6.6 at the comparison shape: training and sampling speed on the CPU, as JSON lines.

Runs in an environment of its own, which has torch and no JAX:

    python3.11 -m venv PEER
    PEER/bin/pip install torch==2.13.0 numpy
    PEER/bin/pip install --no-deps dalle-pytorch==1.6.6
    PEER/bin/pip install einops ftfy regex axial_positional_embedding rotary-embedding-torch tokenizers packaging \\
        pillow tqdm omegaconf webdataset requests 'setuptools<81'
    PEER/bin/python -m benchmarks.peers.peer_dalle_pytorch train_dense train_sparse sample_dense_cached

Its works are `train_` and `sample_` with `dense` or `sparse`, sampling with `_cached` or `_shipped`. It takes two
changes to run it at all, or at its best:

- it imports `taming.models.vqgan`, a package that no longer installs, for two classes that are not used here: empty
  classes stand in;
- `generate_images(use_cache=True)` never hands its cache to the model (`forward_with_cond_scale` drops it), so
  `sample_dense_cached` replaces that one method by one that does, and is what the peer could do, not what it does.
"""

import sys
import types

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.process import BATCH, LEARNING_RATE, SHAPE, serve

TAMING = ("taming", "taming.models", "taming.models.vqgan")
sys.modules.update({name: types.ModuleType(name) for name in TAMING})
for stand_in in ("VQModel", "GumbelVQ"):
    setattr(sys.modules[TAMING[-1]], stand_in, type(stand_in, (), {}))

import dalle_pytorch  # noqa: E402

SPARSE = ("full", "axial_row", "axial_col", "conv_like")


def model_of(work):
    vae = dalle_pytorch.DiscreteVAE(
        image_size=SHAPE["image_size"],
        num_layers=3,
        num_tokens=SHAPE["image_vocab"],
        codebook_dim=64,
        hidden_dim=32,
    )
    return dalle_pytorch.DALLE(
        dim=SHAPE["width"],
        vae=vae,
        num_text_tokens=SHAPE["text_vocab"],
        text_seq_len=SHAPE["text_len"],
        depth=SHAPE["layers"],
        heads=SHAPE["heads"],
        dim_head=SHAPE["head_size"],
        attn_types=SPARSE if "sparse" in work else ("full",),
    )


def text():
    return torch.randint(1, SHAPE["text_vocab"], (BATCH, SHAPE["text_len"]))


def build(work):
    """A function that does one training step (loss, gradients, AdamW) or draws one batch of pictures, with pixels."""
    if work.startswith("sample"):
        return sampler(model_of(work).eval(), cached=work.endswith("cached"))
    model = model_of(work).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    captions, image = text(), torch.randint(0, SHAPE["image_vocab"], (BATCH, SHAPE["grid"] ** 2))

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(captions, image, return_loss=True).backward()
        optimizer.step()

    return step


def sampler(model, *, cached):
    if cached:
        model.forward_with_cond_scale = lambda *args, cond_scale=1, cache=None: model(*args, cache=cache)
    return lambda: model.generate_images(text(), use_cache=cached)


def about():
    """Multiply-adds of its dVAE's decoder, one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model_of("dense").vae.decode(torch.zeros(1, SHAPE["grid"] ** 2, dtype=torch.long))
    return {"decoder_multiply_adds": counter.get_total_flops() // 2}


if __name__ == "__main__":
    serve(__doc__, build, about)
