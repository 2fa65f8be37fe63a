"""Files: the old one or the whole new one at any moment."""

import os

import pytest

from dalle_jax import files


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write(path, "old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as aside:
        aside.write_bytes(b"ne")
        assert path.read_text() == "old" and aside.parent == path.parent and aside.name.startswith(".file.")
        raise KeyboardInterrupt
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_text()) or sync(descriptor))
    files.write(path, b"new")
    assert (synced, path.read_bytes()) == (["old"], b"new")  # on the disk before it has its name
    assert list(tmp_path.iterdir()) == [path]
