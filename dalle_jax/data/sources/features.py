"""Pictures that have become a dVAE's codes once and for all: how `dalle-jax encode` keeps them and training reads them.

    DIR/tokens.json                what all shards have in common, see `Settings`
    DIR/tokens-00000.safetensors   `shard_records` slots each, in the order of the source

A slot is a slot of the source, dropped ones included, so that the same seed gives the same order of records whether
pictures or their codes are read. Captions stay text: they are cut into tokens when they are trained on. A shard holds

    codes      uint16 [good, K, I]   K crops of each usable picture, I codes each in raster order
    row        int32 [slots]         of the slot in `codes`; -1 where there is none
    size       int32 [slots, 2]      height and width of the picture before it was cropped, for the filters
    text       uint8                 JSON of each slot, one after the other: key and captions, or key, reason and detail
    text_ends  int64 [slots]         where each ends

and is mapped into memory, never read whole. Knows no model: what made the codes is a sha256 here.
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
from dalle_jax.errors import UserError
from dalle_jax.files import OpenFiles

SETTINGS, COUNTS = "tokens.json", "counts"  # the file in a folder, the entry in a shard's metadata
FORMAT = 1
MOST_CODES = 1 << 16  # entries of a codebook that uint16 can name


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the codes of a folder were made; equal settings make equal folders.

    dvae_sha256: `digest.of_model` of the dVAE. image_size: pixels per side of a crop. grid, vocab: the dVAE's.
    augment: how a crop was chosen, a name of `transforms.AUGMENTATIONS`. augmentations: crops of each picture.
    seed: of the crops. source, records: what was encoded, dropped records included. shard_records: slots of a shard.
    """

    dvae_sha256: str
    image_size: int
    grid: int
    vocab: int
    augment: str
    augmentations: int
    seed: int
    source: str
    records: int
    shard_records: int
    format: int = FORMAT

    def __post_init__(self):
        for name in ("image_size", "grid", "vocab", "augmentations", "records", "shard_records"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if self.vocab > MOST_CODES:
            raise ValueError(f"vocab must be at most {MOST_CODES:,}, as codes are kept in 16 bits, got {self.vocab:,}")
        if self.format != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {self.format!r}")

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
    """The shards that are there; a file of that name is whole, since it was put there in one piece."""
    names = {entry.name for entry in os.scandir(folder)}
    return {shard for shard in range(settings.shards) if shard_name(shard) in names}


def read_settings(folder: pathlib.Path) -> Settings:
    """What stands in the folder's tokens.json.

    Raises:
      UserError: no such file, or not of this format.
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
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"expected the settings of format {FORMAT} in {path}, got one where {error}") from error


def pack(slots: list[Encoded | Dropped], settings: Settings) -> bytes:
    """A shard of these slots as the bytes of its file."""
    good = [slot for slot in slots if isinstance(slot, Encoded)]
    codes = [slot.tokens_KI for slot in good] or [np.empty((0, settings.augmentations, settings.grid**2), np.uint16)]
    rows = np.cumsum([isinstance(slot, Encoded) for slot in slots]) - 1
    texts = [json.dumps(_described(slot), ensure_ascii=False).encode() for slot in slots]
    arrays = {
        "codes": np.stack(codes) if good else codes[0],
        "row": np.where([isinstance(slot, Encoded) for slot in slots], rows, -1).astype(np.int32),
        "size": np.array([_size(slot) for slot in slots], np.int32),
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "text_ends": np.cumsum([len(text) for text in texts], dtype=np.int64),
    }
    reasons = collections.Counter(slot.reason for slot in slots if isinstance(slot, Dropped))
    # One entry, as safetensors writes several in any order.
    return safetensors.numpy.save(arrays, metadata={COUNTS: json.dumps({"good": len(good), "dropped": reasons})})


def _described(slot: Encoded | Dropped) -> dict:
    if isinstance(slot, Dropped):
        return {"key": slot.key, "reason": slot.reason, "detail": slot.detail}
    return {"key": slot.key, "captions": slot.captions}


def _size(slot: Encoded | Dropped) -> tuple[int, int]:
    return (slot.height, slot.width) if isinstance(slot, Encoded) else (0, 0)


def count(path: pathlib.Path) -> tuple[int, collections.Counter[str]]:
    """Usable records of a shard, and how many were dropped for each reason; reads its header only.

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
    """Records as codes. See `record.Source`; opened by `sources.open_source('tokens:DIR', pictures_required=False)`.

    Raises:
      UserError: no such folder, or not all of its shards.
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
        self._open = OpenFiles(functools.partial(_open_shard, self._folder))

    def __len__(self) -> int:
        return self.settings.records

    def __getitem__(self, index: int) -> Encoded | Dropped:
        index = range(len(self))[index]
        shard, slot = divmod(index, self.settings.shard_records)
        try:
            return self._open[shard].read(slot, vocab=self.settings.vocab)
        except BadRecord as bad:
            return Dropped(f"{shard_name(shard)}/{slot}", bad.reason, bad.detail)

    def refuse_other(self, *, dvae_sha256: str, augment: str, asked_by: str) -> None:
        """Raises UserError unless these are codes of this dVAE and of such crops, which `asked_by` wants."""
        own = self.settings
        if own.dvae_sha256 != dvae_sha256:
            raise UserError(
                f"expected the dVAE whose codes lie in {self._folder} (sha256 {own.dvae_sha256[:12]}), got another "
                f"({dvae_sha256[:12]}): name that one as --config.dvae=DIR, or encode the pictures again with this one"
            )
        if own.augment != augment:
            raise UserError(
                f"expected crops of kind {augment!r} in {self._folder}, as {asked_by} asks, got {own.augment!r}: "
                f"change that, or encode the pictures with --augment {augment}"
            )


def _open_shard(folder: pathlib.Path, number: int) -> "_Shard":
    return _Shard(folder / shard_name(number))


class _Shard:
    """One open shard; its small arrays in memory, codes and text mapped.

    Raises:
      BadRecord: 'unreadable file'.
    """

    def __init__(self, path: pathlib.Path):
        try:
            file = safetensors.safe_open(path, framework="numpy")
            self._row, self._size, self._ends = (file.get_tensor(name) for name in ("row", "size", "text_ends"))
            self._codes, self._text = file.get_slice("codes"), file.get_slice("text")
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
            codes_KI = self._codes[int(self._row[slot])]
            captions = tuple(fields["captions"])
            if codes_KI.max() >= vocab:
                raise BadRecord("broken tokens", f"code {codes_KI.max()} of a dVAE with {vocab}")
        except (LookupError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise BadRecord("broken tokens", f"{type(error).__name__}: {error}") from None
        return Encoded(fields["key"], codes_KI, height, width, captions)
