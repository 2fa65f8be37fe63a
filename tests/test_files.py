"""Files: the old one or the whole new one at any moment, and few open at a time."""

import os
import pickle

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


def test_no_more_files_are_open_than_allowed_and_the_last_ones_stay():
    opened = []

    def open_file(key):
        opened.append(key)
        return f"file {key}"

    found = files.OpenFiles(open_file, max_open=2)
    assert [found[key] for key in (1, 2, 1, 3, 1, 2)] == [f"file {key}" for key in (1, 2, 1, 3, 1, 2)]
    assert opened == [1, 2, 3, 2]  # 2 fell out for 3; 1 was used after it


def test_a_copy_opens_its_own_files(tmp_path):
    files.write(tmp_path / "a", "text")
    found = files.OpenFiles(open, max_open=3)
    first = found[tmp_path / "a"]
    copy = pickle.loads(pickle.dumps(found))
    assert copy[tmp_path / "a"] is not first and copy[tmp_path / "a"].read() == first.read() == "text"
