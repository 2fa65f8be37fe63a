"""VQGANs of taming-transformers in torch, encoding, decoding and training on the CPU: seconds, as JSON lines.

`compare.py --peer vqgan` alternates with it. Runs in an environment of its own, which has torch and no JAX:

    python3.11 -m venv PEER
    PEER/bin/pip install torch==2.13.0 numpy einops tqdm
    PEER/bin/pip install --no-deps taming-transformers-rom1504==0.0.6
    PEER/bin/python -m benchmarks.peers.peer_taming encode_f16_256_nchw decode_f16_256_nchw

Encoder, decoder and quantizers are the package's, joined as its `VQModel` and `GumbelVQ` join them, whose own file
needs a PyTorch Lightning of years ago. Gumbel's tokens are the largest logits, without the noise and the sum over all
codes that its quantizer computes beside them. nchw is torch's own layout, nhwc its `channels_last`.
"""

import contextlib
import functools
import sys

import torch
import torch.nn.functional as F
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2

from benchmarks.peers import vqgan
from benchmarks.peers.process import serve


def build(work):
    verb, network, side, layout = work.split("_")
    layout = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    return {"encode": encoder, "decode": decoder, "train": trainer}[verb](network, int(side), layout)


class Network(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        shape = vqgan.SHAPES[name]
        sizes = dict(ch=128, out_ch=3, in_channels=3, num_res_blocks=2, z_channels=256, double_z=False, dropout=0.0)
        sizes |= dict(ch_mult=shape["multipliers"], resolution=vqgan.SIDE)
        sizes |= dict(attn_resolutions=[vqgan.SIDE // 2**level for level in shape["attention_levels"]])
        self.gumbel = shape["quantizer"] == "gumbel"
        with contextlib.redirect_stdout(sys.stderr):  # the decoder prints its sizes
            self.encoder, self.decoder = Encoder(**sizes), Decoder(**sizes)
        self.quant_conv, self.post_quant_conv = torch.nn.Conv2d(256, 256, 1), torch.nn.Conv2d(256, 256, 1)
        if self.gumbel:
            self.quantize = GumbelQuantize(256, 256, n_embed=shape["vocab"])
        else:
            self.quantize = VectorQuantizer2(shape["vocab"], 256, beta=vqgan.COMMITMENT)
        state = vqgan.weights({key: tuple(value.shape) for key, value in self.state_dict().items()})
        self.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})

    def encode(self, x):
        """Tokens [B, R, C]."""
        z = self.quant_conv(self.encoder(x))
        if self.gumbel:
            return self.quantize.proj(z).argmax(1)
        return self.quantize(z)[2][2].view(len(x), *z.shape[2:])

    def decode(self, tokens):
        codes = self.quantize.embed if self.gumbel else self.quantize.embedding
        return self.decoder(self.post_quant_conv(codes(tokens).permute(0, 3, 1, 2)))

    def forward(self, x):
        """Reconstruction, and the codebook's loss."""
        q, loss, _ = self.quantize(self.quant_conv(self.encoder(x)))
        return self.decoder(self.post_quant_conv(q)), loss


@functools.cache
def evaluated(name, layout):
    return Network(name).eval().to(memory_format=layout)


def pictures(side, layout):
    return torch.from_numpy(vqgan.in_range(vqgan.pictures(side))).permute(0, 3, 1, 2).contiguous(memory_format=layout)


def encoder(name, side, layout):
    """A function that makes image tokens of a batch of pictures."""
    network, x = evaluated(name, layout), pictures(side, layout)
    return torch.no_grad()(lambda: network.encode(x))


def decoder(name, side, layout):
    """A function that makes pictures of a batch of image tokens."""
    network, tokens = evaluated(name, layout), torch.from_numpy(vqgan.tokens(name, side))
    return torch.no_grad()(lambda: network.decode(tokens))


def trainer(name, side, layout):
    """A function that does one training step: L1 and the codebook's loss, without LPIPS and an adversary."""
    network, x = Network(name).to(memory_format=layout), pictures(side, layout)
    optimizer = torch.optim.Adam(network.parameters(), lr=vqgan.LEARNING_RATE, betas=(0.5, 0.9))

    def step():
        optimizer.zero_grad(set_to_none=True)
        y, codebook_loss = network(x)
        (F.l1_loss(y, x) + codebook_loss).backward()
        optimizer.step()

    return step


def checked():
    """The image tokens of some pictures, to be compared."""
    name, side = vqgan.CHECKED
    return {"tokens": encoder(name, side, torch.contiguous_format)().flatten().tolist()}


if __name__ == "__main__":
    serve(__doc__, build, checked)
