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

import functools
import sys
import types

from benchmarks.peers.process import Works, serve

SHAPE = dict(
    layers=4, width=256, heads=4, head_size=64, text_len=64, text_vocab=1000, grid=16, image_vocab=1024, image_size=128
)
BATCH, THREADS = 4, 2
LEARNING_RATE = 3e-4
SPARSE = ("full", "axial_row", "axial_col", "conv_like")


def import_peer():
    """The package, with empty stand-ins for the one that no longer installs."""
    names = ("taming", "taming.models", "taming.models.vqgan")
    sys.modules.update({name: types.ModuleType(name) for name in names})
    for stand_in in ("VQModel", "GumbelVQ"):
        setattr(sys.modules[names[-1]], stand_in, type(stand_in, (), {}))
    import dalle_pytorch

    return dalle_pytorch


def attn_types(work):
    return SPARSE if "sparse" in work else ("full",)


class Peer:
    """Its models and works."""

    def __init__(self):
        import torch

        self.torch = torch
        torch.set_num_threads(THREADS)
        torch.manual_seed(0)
        self.package = import_peer()
        self.training, self.sampling = Works(self.trainer), Works(self.sampler, first_runs=0)

    def model(self, attn_types):
        vae = self.package.DiscreteVAE(
            image_size=SHAPE["image_size"],
            num_layers=3,
            num_tokens=SHAPE["image_vocab"],
            codebook_dim=64,
            hidden_dim=32,
        )
        return self.package.DALLE(
            dim=SHAPE["width"],
            vae=vae,
            num_text_tokens=SHAPE["text_vocab"],
            text_seq_len=SHAPE["text_len"],
            depth=SHAPE["layers"],
            heads=SHAPE["heads"],
            dim_head=SHAPE["head_size"],
            attn_types=attn_types,
        )

    def text(self):
        return self.torch.randint(1, SHAPE["text_vocab"], (BATCH, SHAPE["text_len"]))

    def trainer(self, work):
        """A function that does one training step: loss, gradients, AdamW."""
        model = self.model(attn_types(work)).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = self.torch.optim.AdamW(parameters, lr=LEARNING_RATE)
        image = self.torch.randint(0, SHAPE["image_vocab"], (BATCH, SHAPE["grid"] ** 2))
        text = self.text()

        def step():
            optimizer.zero_grad(set_to_none=True)
            model(text, image, return_loss=True).backward()
            optimizer.step()

        return step

    def sampler(self, work):
        """A function that draws one batch of pictures, pixels included."""
        model, cached = self.model(attn_types(work)).eval(), work.endswith("cached")
        if cached:
            model.forward_with_cond_scale = lambda *args, cond_scale=1, cache=None: model(*args, cache=cache)
        return lambda: model.generate_images(self.text(), use_cache=cached)

    @functools.cached_property
    def decoder_multiply_adds(self):
        """Of its dVAE's decoder, one image."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter, self.torch.no_grad():
            self.model(("full",)).vae.decode(self.torch.zeros(1, SHAPE["grid"] ** 2, dtype=self.torch.long))
        return counter.get_total_flops() // 2

    def measure(self, work, repeats):
        works = self.training if work.startswith("train") else self.sampling
        about = {"torch": self.torch.__version__, "decoder_multiply_adds": self.decoder_multiply_adds}
        return {"seconds": works.measure(work, repeats), **about}


if __name__ == "__main__":
    serve(__doc__, Peer().measure)
