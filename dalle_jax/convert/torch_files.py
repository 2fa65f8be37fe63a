"""PyTorch's files, zip archives and what came before them, read without PyTorch."""

import re
import zipfile
from typing import Any

import numpy as np

from dalle_jax.convert import stored
from dalle_jax.convert.pickles import Storage, load
from dalle_jax.convert.stored import Array, Stored
from dalle_jax.errors import UserError

STATE_KEYS = ("state_dict", "model", "module")  # of checkpoints by Lightning, by hand and by DeepSpeed
MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a file that is no archive


def read(path: str, *, zipped: bool) -> dict[str, Array]:
    """The tensors of a state dict, also of one within a checkpoint; zipped: the file is an archive.

    Raises:
      UserError: the file would call something, is damaged, or holds something else.
    """
    with stored.reading(path):
        found = _zip(path) if zipped else _legacy(path)
    if isinstance(found, dict):  # a checkpoint of a training has it beside the state of the optimizer
        found = next((found[key] for key in STATE_KEYS if isinstance(found.get(key), dict)), found)
        tensors: dict[str, Array] = {name: value for name, value in found.items() if isinstance(value, Stored)}
        if tensors:
            return tensors
    raise UserError(f"expected a state dict (names and tensors) in {path}, got a {type(found).__name__} without any")


def _zip(path: str) -> Any:
    """The object of an archive: data.pkl, and each storage in a file data/KEY, not compressed."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        (pickled,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name))
        folder = pickled.removesuffix("data.pkl")

        def entry(name: str) -> zipfile.ZipInfo:
            found = archive.getinfo(folder + name)
            if found.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"a compressed {name}, which PyTorch does not write")
            return found

        def storage(dtype: np.dtype, key: str, count: int) -> Storage:
            found = entry(f"data/{key}")
            file.seek(found.header_offset + 26)  # lengths of name and extra field, which lie before the data
            lengths = [int.from_bytes(file.read(2), "little") for _ in range(2)]
            if count * dtype.itemsize > found.file_size:
                raise ValueError(f"a storage of {found.file_size} bytes for {count} numbers")
            return Storage(path, dtype, found.header_offset + 30 + sum(lengths), count)

        if folder + "byteorder" in archive.namelist():
            _check_order(archive.read(entry("byteorder")) == b"little")
        with archive.open(entry("data.pkl")) as data:
            return load(path, data, storage)


def _legacy(path: str) -> Any:
    """The object of a file that is no archive: five pickles (the fourth is it), then the storages one by one."""
    with open(path, "rb") as file:
        types: dict[str, np.dtype] = {}
        places: dict[str, tuple[int, int]] = {}  # start and count

        def storage(dtype: np.dtype, key: str, count: int) -> Storage:
            start, stored_count = places.get(key, (0, count))
            if count > stored_count:
                raise ValueError(f"a storage of {stored_count} numbers for {count}")
            return Storage(path, types.setdefault(key, dtype), start, count)

        if load(path, file, storage) != MAGIC:
            raise ValueError("another pickle than torch.save makes")
        _, system = (load(path, file, storage) for _ in range(2))
        _check_order(system.get("little_endian", True))
        place = file.tell()
        load(path, file, storage)  # for the types, which say where each storage ends
        for key in load(path, file, storage):
            count = int.from_bytes(file.read(8), "little")
            places[key] = file.tell(), count
            file.seek(count * types[key].itemsize, 1)
        file.seek(place)
        return load(path, file, storage)


def _check_order(little: bool) -> None:
    if not little:
        raise ValueError("numbers whose bytes are in the order of another processor")
