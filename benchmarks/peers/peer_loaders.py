"""The peers of `benchmarks/peers/input.py`, in a Python of their own: webdataset, and torch's DataLoader over a folder.

Written as their users write them: a random square crop of 3/4 to all of the area, brought to the size by Pillow's
bilinear filter (torchvision's RandomResizedCrop, which does the same calls), the caption cut by Hugging Face's
tokenizers with BPE dropout, batches of uint8. Everything runs in the one process, which is fastest on one core.
Answers a number on stdin with the images a second of so many batches.

    python -m benchmarks.peers.peer_loaders webdataset SHARD.tar SIZE VOCABULARY.txt
"""

import io
import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
import webdataset
from PIL import Image

BATCH, TEXT_LEN, DROPOUT, MIN_AREA, SHUFFLED = 32, 64, 0.1, 0.75, 1000
VOCAB = 2048


def train_tokenizer(captions: list[str]) -> tokenizers.Tokenizer:
    """A BPE with dropout over lower-case words, as `tokenizers` documents it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(dropout=DROPOUT, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


class Prepare:
    """Picture and caption to two tensors."""

    def __init__(self, size: int, tokenizer: tokenizers.Tokenizer):
        self.size, self.tokenizer = size, tokenizer

    def __call__(self, image: Image.Image, caption: str):
        if image.mode != "RGB":
            image = image.convert("RGB")
        side = round(math.sqrt(random.uniform(MIN_AREA, 1.0)) * min(image.size))
        left, top = random.randint(0, image.width - side), random.randint(0, image.height - side)
        crop = image.crop((left, top, left + side, top + side)).resize((self.size,) * 2, Image.Resampling.BILINEAR)
        ids = self.tokenizer.encode(caption).ids[:TEXT_LEN]
        text = torch.zeros(TEXT_LEN, dtype=torch.long)
        text[: len(ids)] = torch.tensor(ids)
        return torch.from_numpy(np.array(crop)), text


class Folder(torch.utils.data.Dataset):
    """NAME.jpg or NAME.png with NAME.txt beside it."""

    def __init__(self, folder: str, prepare: Prepare):
        self.paths = sorted(path for path in Path(folder).iterdir() if path.suffix in (".jpg", ".png"))
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        path = self.paths[index]
        caption = random.choice(path.with_suffix(".txt").read_text().splitlines())
        return self.prepare(Image.open(path), caption)


def batches(peer: str, place: str, prepare: Prepare):
    """Shuffled batches without end."""
    if peer == "torch":
        loader = torch.utils.data.DataLoader(Folder(place, prepare), batch_size=BATCH, shuffle=True, drop_last=True)
        while True:
            yield from loader
    dataset = webdataset.WebDataset(place, shardshuffle=False).shuffle(SHUFFLED).to_tuple("jpg;png", "txt")
    pairs = dataset.map(
        lambda pair: prepare(Image.open(io.BytesIO(pair[0])), random.choice(pair[1].decode().splitlines()))
    )
    yield from pairs.repeat().batched(BATCH)


def main(peer: str, place: str, size: str, captions: str):
    torch.set_num_threads(1)
    found = batches(peer, place, Prepare(int(size), train_tokenizer(Path(captions).read_text().splitlines())))
    next(found)
    versions = f"torch {torch.__version__}, webdataset {webdataset.__version__}, their Pillow {Image.__version__}"
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            next(found)
        rate = int(line) * BATCH / (time.perf_counter() - began)
        print(json.dumps({"rate": rate, "versions": versions}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
