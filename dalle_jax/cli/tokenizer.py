"""`dalle-jax tokenizer SOURCE`: learn a BPE vocabulary from all captions of a source and report how well it fits."""

import argparse
import logging

import numpy as np
import tqdm

from dalle_jax.data.record import Dropped, Source
from dalle_jax.data.sources import HELP, open_source
from dalle_jax.errors import check_number, writing_to
from dalle_jax.text import Tokenizer
from dalle_jax.text.bpe import RESERVED, BPETokenizer

DESCRIBED = 20_000  # captions for the summary line, evenly spread
MAX_VOCAB = 1 << 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `main`."""
    parser.add_argument("source", help=HELP)
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=16_384,
        metavar="N",
        help=f"entries of the vocabulary, {RESERVED} of them reserved (default: %(default)s)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for tokenizer.model")


def main(args: argparse.Namespace) -> int:
    """Trains, saves and describes a tokenizer.

    Raises:
      UserError: no captions, an impossible vocabulary size or a folder that cannot be written.
    """
    check_number("--vocab-size", args.vocab_size, min=RESERVED + 16, max=MAX_VOCAB, whole=True)
    logging.basicConfig(format="%(message)s")
    captions = read_captions(open_source(args.source, pictures_required=False))
    tokenizer = BPETokenizer.train(captions, vocab_size=args.vocab_size)
    with writing_to(args.out):
        path = tokenizer.save(args.out)
    print(f"{path}: {describe(tokenizer, captions)}")
    return 0


def read_captions(source: Source) -> list[str]:
    """Every caption of every good record, with a progress bar."""
    captions = []
    for i in tqdm.trange(len(source), desc="captions", unit="record"):
        record = source[i]
        if not isinstance(record, Dropped):
            captions.extend(record.captions)
    return captions


def describe(tokenizer: Tokenizer, captions: list[str]) -> str:
    """One line: entries, tokens per caption, the share of tokens that are bytes, and the digest."""
    sample = captions[:: max(1, len(captions) // DESCRIBED)]
    ids = [tokenizer.encode(caption) for caption in sample]
    lengths = np.array([len(tokens) for tokens in ids])
    share = sum(token < RESERVED for tokens in ids for token in tokens) / max(1, lengths.sum())
    return (
        f"{tokenizer.vocab_size} pieces, {len(captions)} captions, tokens per caption mean {lengths.mean():.1f}, "
        f"95 % {np.percentile(lengths, 95):.0f}, max {lengths.max()}, byte fallback {share:.2%}, "
        f"digest {tokenizer.digest[:12]}"
    )
