"""A source whose records say their number in the image and in the caption, and the batches made of it."""

import numpy as np

from dalle_jax.data.pipeline import Batches, DataConfig, Prepare
from dalle_jax.data.record import Dropped, Record
from dalle_jax.layout import Layout

WORDS = "zero one two three four five six seven eight nine".split()
LAYOUT = Layout(text_len=24, text_vocab=320, grid=2, image_vocab=8)


def caption(i):
    return " ".join(WORDS[int(digit)] for digit in str(i))


class Numbers:
    """Record i: a picture whose pixels and whose first caption say i; slots in `faults` are dropped."""

    name = "numbers"

    def __init__(self, count, *, faults=(), captions=1, side=12):
        self.count, self.faults, self.captions, self.side, self.read = count, faults, captions, side, []

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        self.read.append(i)
        if i in self.faults:
            return Dropped(f"key{i}", "no image")
        image = np.random.default_rng(i).integers(0, 256, (self.side, self.side + 8, 3), np.uint8)
        return Record(f"key{i}", image, (caption(i), *[f"{caption(i)} nine {j}" for j in range(1, self.captions)]))


def batches(source, tokenizer, *, config=None, batch_size=4, seed=7, shuffle=True, epochs=None, **kwargs):
    config = config or DataConfig(image_size=8, augment="transformer", bpe_dropout=0.1)
    layout = None if tokenizer is None else LAYOUT
    prepare = Prepare(config, layout, tokenizer)
    return Batches(source, prepare, batch_size=batch_size, seed=seed, shuffle=shuffle, epochs=epochs, **kwargs)


def numbers_of(batch, tokenizer):
    """Which records a batch holds, read back from its text."""
    texts = [tokenizer.decode([i for i in text[1:].tolist() if i < LAYOUT.text_vocab]) for text in batch["text"]]
    return [int("".join(str(WORDS.index(word)) for word in text.split())) for text in texts]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]
