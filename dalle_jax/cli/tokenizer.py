"""`dalle-jax tokenizer SOURCE`: learn a BPE vocabulary from the captions of a source and report how well it fits.

Images are not read. Memory grows with the different words of the captions, not with their number.
"""

import argparse
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm

from dalle_jax import files
from dalle_jax.data.in_order import evenly_spread, in_order
from dalle_jax.data.pipeline import MAX_THREADS
from dalle_jax.data.record import Source, captions_of
from dalle_jax.data.sources import HELP, open_source
from dalle_jax.errors import check_number, writing_to
from dalle_jax.text import Tokenizer
from dalle_jax.text.bpe import RESERVED, BPETokenizer

LIMIT = 4_000_000  # records: enough to learn 16,384 pieces from, and bounded in time and memory
DESCRIBED = 20_000  # captions for the summary line, evenly spread
BLOCK = 256  # records for one thread at a time
MAX_VOCAB = 1 << 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `main`."""

    def add(flag: str, words: str, **options) -> None:
        parser.add_argument(flag, help=words + (" (default: %(default)s)" if "default" in options else ""), **options)

    add("source", HELP)
    add(
        "--vocab-size", f"entries of the vocabulary, {RESERVED} of them reserved", type=int, default=16_384, metavar="N"
    )
    add("--limit", "read the captions of N records, evenly spread", type=int, default=LIMIT, metavar="N")
    add("--threads", "threads that read", type=int, default=os.cpu_count() or 1, metavar="N")
    add("--out", "folder for tokenizer.model", required=True, type=pathlib.Path, metavar="DIR")


def main(args: argparse.Namespace) -> int:
    """Trains, saves and describes a tokenizer.

    Raises:
      UserError: no captions, a number out of range or a folder that cannot be written.
    """
    check_number("--vocab-size", args.vocab_size, min=RESERVED + 16, max=MAX_VOCAB, whole=True)
    check_number("--limit", args.limit, min=1, whole=True)
    check_number("--threads", args.threads, min=1, max=MAX_THREADS, whole=True)
    logging.basicConfig(format="%(message)s")
    source = open_source(args.source, pictures_required=False)
    with writing_to(args.out):
        files.prepare(args.out)
    rows = evenly_spread(len(source), args.limit)
    every, read, sample = max(1, len(rows) // DESCRIBED), 0, []

    def captions() -> Iterator[str]:
        nonlocal read
        for read, caption in enumerate(read_captions(source, rows, threads=args.threads), 1):
            if (read - 1) % every == 0:
                sample.append(caption)
            yield caption

    tokenizer = BPETokenizer.train(captions(), vocab_size=args.vocab_size)
    with writing_to(args.out):
        path = tokenizer.save(args.out)
    print(f"{path}: {describe(tokenizer, sample)}, of {read} captions in {len(rows)} of {len(source)} records")
    return 0


def read_captions(source: Source, rows: Sequence[int], *, threads: int) -> Iterator[str]:
    """Every caption of these records, in order, with a progress bar."""

    def read(block: Sequence[int]) -> list[str]:
        return [caption for row in block for caption in captions_of(source, row)]

    blocks = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
    with tqdm.tqdm(total=len(rows), desc="captions", unit=" records", disable=None, file=sys.stderr) as bar:
        for captions in in_order(read, blocks, threads=threads, ahead=4 * threads):
            bar.update(BLOCK)
            yield from captions


def describe(tokenizer: Tokenizer, captions: Sequence[str]) -> str:
    """Entries, tokens per caption, the share of tokens that are bytes, and the digest, in one line."""
    ids = [tokenizer.encode(caption) for caption in captions]
    lengths = np.array([len(tokens) for tokens in ids])
    share = sum(token < RESERVED for tokens in ids for token in tokens) / max(1, lengths.sum())
    return (
        f"{tokenizer.vocab_size} pieces, tokens per caption mean {lengths.mean():.1f}, "
        f"95 % {np.percentile(lengths, 95):.0f}, max {lengths.max()}, byte fallback {share:.2%}, "
        f"digest {tokenizer.digest[:12]}"
    )
