"""OpenAI's dVAE modules in torch, trained on the CPU: seconds, as JSON lines. `compare.py` alternates with it.

Runs in an environment of its own, which has torch and no JAX:

    python3.11 -m venv PEER
    PEER/bin/pip install torch==2.13.0 numpy
    PEER/bin/pip install --no-deps DALL-E==0.1
    PEER/bin/pip install attrs blobfile mypy requests
    PEER/bin/python -m benchmarks.peers.peer_openai_dvae train_nchw train_nhwc

The package has the encoder and the decoder; what trains them here is the paper's objective with the same noise and the
same terms as ours (`dalle_jax/train/objectives/dvae.py`) and torch's fused AdamW. NCHW is torch's own layout, NHWC its
`channels_last`; bf16 is its autocast, as the modules' own half precision is for CUDA alone.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from dall_e import Decoder, Encoder

from benchmarks.peers.dvae import BATCH, BETA, LEARNING_RATE, SHAPE
from benchmarks.peers.process import serve


def build(work):
    verb, _, way = work.partition("_")
    return {"train": trainer, "encode": encoder}[verb](way)


def networks():
    sizes = dict(n_hid=SHAPE["width"], vocab_size=SHAPE["vocab"], n_blk_per_group=SHAPE["blocks_per_group"])
    return Encoder(**sizes), Decoder(n_init=SHAPE["stem"], **sizes)


def pictures(layout):
    x = 0.1 + 0.8 * torch.rand(BATCH, 3, SHAPE["image_size"], SHAPE["image_size"])
    return x.contiguous(memory_format=layout)


def layout_of(way):
    return torch.channels_last if "nhwc" in way else torch.contiguous_format


def precision_of(way):
    return torch.autocast("cpu", torch.bfloat16) if "bf16" in way else contextlib.nullcontext()


def trainer(way):
    """A function that does one training step."""
    layout = layout_of(way)
    encode, decode = (network.to(memory_format=layout) for network in networks())
    parameters = [*encode.parameters(), *decode.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    x, vocab = pictures(layout), SHAPE["vocab"]

    def loss():
        logits = encode(x).float()
        gumbel = -torch.empty_like(logits).exponential_().log()
        z = F.softmax(logits + gumbel, dim=1)
        mu, log_scale = decode(z).float().chunk(2, dim=1)
        log_x, log_rest = x.log(), torch.log1p(-x)
        distance = (log_x - log_rest - mu).abs()
        nll = math.log(2.0) + log_scale + log_x + log_rest + distance * torch.exp(-log_scale)
        log_q = F.log_softmax(logits, dim=1)
        kl = (log_q.exp() * log_q).sum(1) + math.log(vocab)
        return nll.mean() + BETA * kl.sum() / x.numel()

    def step():
        optimizer.zero_grad(set_to_none=True)
        with precision_of(way):
            value = loss()
        value.backward()
        optimizer.step()

    return step


def encoder(way):
    """A function that makes codes of a batch of pictures."""
    layout = layout_of(way)
    encode, x = networks()[0].to(memory_format=layout), pictures(layout)

    def run():
        with torch.no_grad(), precision_of(way):
            encode(x).argmax(1)

    return run


if __name__ == "__main__":
    serve(__doc__, build)
