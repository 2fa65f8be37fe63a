"""Image tokens made once by `dalle-jax encode`: how a folder holds them, and a source that reads them.

    DIR/tokens.json                what all shards have in common, see `Settings`
    DIR/tokens-00000.safetensors   `shard_records` slots each, in the order of the source

A slot here is a slot of the source, dropped ones included, so that the same seed gives the same order of records
whether images or their tokens are read. Captions are kept as text and tokenized when they are read. A shard holds

    codes      uint16 [good, A, I]   A crops of each usable image, I image tokens each in raster order
    row        int32 [slots]         of the slot in `codes`; -1 for a dropped one
    size       int32 [slots, 2]      height and width of the image before it was cropped, for the filters
    text       uint8                 JSON of each slot, one after the other: key and captions, or key, reason and detail
    text_ends  int64 [slots]         where each ends

and is mapped into memory, never read whole. The model that made the tokens is known by its sha256 only.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from dalle_jax.data.record import BadRecord, Dropped, Encoded
from dalle_jax.errors import UserError, check_number

SETTINGS, COUNTS = "tokens.json", "counts"  # the file in a folder, the entry in a shard's metadata
FORMAT = 1
OPEN_SHARDS = 64  # far below the usual limit of 1,024 open files a process
MAX_VOCAB = 1 << 16  # image tokens that uint16 can name


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that made the tokens of a folder; equal ones make equal folders."""

    dvae_sha256: str  # `digest.of_model` of the image tokenizer, whatever its kind
    image_size: int  # pixels per side of a crop
    grid: int  # image tokens per side
    vocab: int
    augment: str  # how crops were chosen, a name of `transforms.AUGMENTATIONS`
    augmentations: int  # crops of each image
    seed: int  # of the crops
    source: str
    records: int  # of the source, dropped ones included
    shard_records: int  # slots of a shard
    format: int = FORMAT

    def __post_init__(self):
        for name in ("image_size", "grid", "augmentations", "records", "shard_records"):
            check_number(name, getattr(self, name), min=1, whole=True)
        check_number("seed", self.seed, min=0, whole=True)
        check_number("vocab", self.vocab, min=1, max=MAX_VOCAB, whole=True)  # in 16 bits
        check_number("format", self.format, min=FORMAT, max=FORMAT, whole=True)

    @property
    def shards(self) -> int:
        return -(-self.records // self.shard_records)

    def slots(self, shard: int) -> range:
        """The slots of a shard."""
        first = shard * self.shard_records
        return range(first, min(first + self.shard_records, self.records))


def shard_name(shard: int) -> str:
    return f"tokens-{shard:05d}.safetensors"


def finished(folder: pathlib.Path, settings: Settings) -> set[int]:
    """The shards that are there; a file of such a name is whole (`files.write`)."""
    names = set(os.listdir(folder))
    return {shard for shard in range(settings.shards) if shard_name(shard) in names}


def read_settings(folder: pathlib.Path) -> Settings:
    """The settings of a folder.

    Raises:
      UserError: no tokens.json there, or not of this format.
    """
    path = folder / SETTINGS
    try:
        fields = json.loads(path.read_text())
        if fields.get("augment") == "centre":  # as version 0.1 wrote it
            fields["augment"] = "center"
        return Settings(**fields)
    except OSError as error:
        raise UserError(
            f"expected a folder that `dalle-jax encode` made, got {folder} without a readable {SETTINGS} "
            f"({error.strerror}): check the path"
        ) from error
    except (ValueError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"expected what `dalle-jax encode` writes in {path}, but it is wrong: {error}") from error


def pack(slots: list[Encoded | Dropped], settings: Settings) -> bytes:
    """A shard of these slots as the bytes of its file."""
    good = [slot for slot in slots if isinstance(slot, Encoded)]
    none = np.empty((0, settings.augmentations, settings.grid**2), np.uint16)
    usable = np.array([isinstance(slot, Encoded) for slot in slots])
    sizes = [(slot.height, slot.width) if isinstance(slot, Encoded) else (0, 0) for slot in slots]
    fields = [
        {"key": slot.key, "captions": slot.captions} if isinstance(slot, Encoded) else dataclasses.asdict(slot)
        for slot in slots
    ]
    # Keys may be names of files that are no Unicode; `json.loads` reads such bytes as they were.
    texts = [json.dumps(of_slot, ensure_ascii=False).encode("utf-8", "surrogatepass") for of_slot in fields]
    arrays = {
        "codes": np.stack([slot.tokens_AI for slot in good]) if good else none,
        "row": np.where(usable, np.cumsum(usable) - 1, -1).astype(np.int32),
        "size": np.array(sizes, np.int32),
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "text_ends": np.cumsum([len(text) for text in texts], dtype=np.int64),
    }
    reasons = collections.Counter(slot.reason for slot in slots if isinstance(slot, Dropped))
    # A single entry, because safetensors writes several in any order.
    return safetensors.numpy.save(arrays, metadata={COUNTS: json.dumps({"good": len(good), "dropped": reasons})})


def count(path: pathlib.Path) -> tuple[int, collections.Counter[str]]:
    """The number of usable records of a shard, and of dropped ones by reason; reads the header only.

    Raises:
      UserError: not a shard of this format.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as shard:
            counts = json.loads(shard.metadata()[COUNTS])
            return counts["good"], collections.Counter(counts["dropped"])
    except (OSError, safetensors.SafetensorError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"expected a shard that `dalle-jax encode` made, got {path} ({error}): delete it and give the command again"
        ) from error


class TokenSource:
    """Records as image tokens. See `record.Source`; opened by `open_source('tokens:DIR', pictures_required=False)`.

    Raises:
      UserError: no such folder, or shards are missing.
    """

    def __init__(self, name: str, folder: str):
        self.name, self._folder = name, pathlib.Path(folder)
        self.settings = read_settings(self._folder)
        missing = self.settings.shards - len(finished(self._folder, self.settings))
        if missing:
            raise UserError(
                f"expected {self.settings.shards} shards in {folder}, {missing} of them are not there: give the "
                "`dalle-jax encode` command again, which does what is left"
            )
        self._shard = functools.lru_cache(OPEN_SHARDS)(_Shard)  # the shards used last

    def __reduce__(self):
        return TokenSource, (self.name, str(self._folder))

    def __len__(self) -> int:
        return self.settings.records

    def __getitem__(self, index: int) -> Encoded | Dropped:
        index = range(len(self))[index]
        shard, slot = divmod(index, self.settings.shard_records)
        try:
            return self._shard(self._folder / shard_name(shard)).read(slot, vocab=self.settings.vocab)
        except BadRecord as bad:
            return Dropped(f"{shard_name(shard)}/{slot}", bad.reason, bad.detail)

    def check_made_by(self, *, sha256: str, augment: str, asked_by: str) -> None:
        """Raise UserError unless the image tokenizer of this sha256 made the tokens, of the crops `asked_by` wants."""
        made = self.settings
        if made.dvae_sha256 != sha256:
            raise UserError(
                f"expected the image tokenizer that made the tokens in {self._folder} (sha256 "
                f"{made.dvae_sha256[:12]}), got another ({sha256[:12]}): name that one as "
                "--config.frozen.image_tokenizer=DIR, or encode the images again with this one"
            )
        if made.augment != augment:
            raise UserError(
                f"expected crops of kind {augment!r} in {self._folder}, as {asked_by} asks, got {made.augment!r}: "
                f"change that, or encode the images with --augment {augment}"
            )


class _Shard:
    """One open shard: its small arrays in memory, tokens and text mapped.

    Raises:
      BadRecord: 'unreadable file'.
    """

    def __init__(self, path: pathlib.Path):
        try:
            file = safetensors.safe_open(path, framework="numpy")
            self._row, self._size, self._ends = (file.get_tensor(name) for name in ("row", "size", "text_ends"))
            self._tokens, self._text = file.get_slice("codes"), file.get_slice("text")
        except (OSError, safetensors.SafetensorError) as error:
            raise BadRecord("unreadable file", str(error)) from None

    def read(self, slot: int, *, vocab: int) -> Encoded | Dropped:
        """Raises BadRecord: 'broken tokens'."""
        try:
            start, end = int(self._ends[slot - 1]) if slot else 0, int(self._ends[slot])
            fields = json.loads(self._text[start:end].tobytes())
            if "reason" in fields:
                return Dropped(**fields)
            height, width = self._size[slot].tolist()
            tokens_AI = self._tokens[int(self._row[slot])]
            captions = tuple(fields["captions"])
            if tokens_AI.max() >= vocab:
                raise BadRecord("broken tokens", f"image token {tokens_AI.max()} of a vocabulary of {vocab}")
        except (LookupError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise BadRecord("broken tokens", f"{type(error).__name__}: {error}") from None
        return Encoded(fields["key"], tokens_AI, height, width, captions)
