"""OpenAI's dVAE modules in torch, trained on the CPU: seconds, as JSON lines. `dvae.py` alternates with it.

Runs in an environment of its own, which has torch and no JAX:

    python3.11 -m venv PEER
    PEER/bin/pip install torch==2.13.0 numpy
    PEER/bin/pip install --no-deps DALL-E==0.1
    PEER/bin/pip install attrs blobfile mypy requests
    PEER/bin/python -m benchmarks.peers.peer_openai_dvae train_nchw train_nhwc

The package has the encoder and the decoder; what trains them here is the paper's objective with the same noise and the
same terms as ours (`dalle_jax/train/dvae_task.py`) and torch's fused AdamW. NCHW is torch's own layout, NHWC its
`channels_last`; bf16 is its autocast, as the modules' own half precision is for CUDA alone.
"""

import argparse
import contextlib
import json
import math
import sys

import torch
import torch.nn.functional as F
from dall_e import Decoder, Encoder

from benchmarks.peers.works import Works

SHAPE = dict(image_size=64, vocab=1024, width=64, stem=128, blocks_per_group=1)  # groups and kernels are the paper's
BATCH, THREADS, LEARNING_RATE, BETA = 8, 2, 1e-4, 6.6
# Channels in and out of 3 x 3 convolutions, and the side of what they run over: of the first group of encoder and
# decoder's last one, and of the groups at the grid.
CONVOLUTIONS = ((64, 16, 64), (16, 64, 64), (512, 128, 8), (128, 512, 8))


class Peer:
    """Its models, each built at its first use and kept."""

    def __init__(self):
        torch.set_num_threads(THREADS)
        torch.manual_seed(0)
        self.works = Works(build)

    def measure(self, work, repeats):
        seconds = self.works.measure(work, repeats)
        return {"work": work, "seconds": seconds, "torch": torch.__version__}


def build(work):
    verb, _, way = work.partition("_")
    return {"train": trainer, "encode": encoder, "conv": convolution}[verb](way)


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


def convolution(way):
    """What one 3 x 3 convolution computes: `fwd`, `dx` or `dw` (gradients of its input and of its weights)."""
    part, index, *_ = way.split("_")
    before, after, side = CONVOLUTIONS[int(index)]
    dtype, layout = torch.bfloat16 if "bf16" in way else torch.float32, layout_of(way)
    made = [
        torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        for shape in ((BATCH, before, side, side), (after, before, 3, 3), (BATCH, after, side, side))
    ]
    x, weight, cotangent = made
    wanted = [part == "dx", part == "dw", False]

    def run():
        if part == "fwd":
            F.conv2d(x, weight, padding=1)
        else:
            torch.ops.aten.convolution_backward(
                cotangent, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
            )

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("works", nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help="read `WORK REPEATS` lines from stdin")
    args = parser.parse_args()
    peer = Peer()
    requests = (line.split() for line in sys.stdin) if args.serve else ((w, args.repeats) for w in args.works)
    for work, repeats in requests:
        print(json.dumps(peer.measure(work, int(repeats))), flush=True)


if __name__ == "__main__":
    main()
