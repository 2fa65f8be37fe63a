"""Files: the old one or the whole new one at any moment."""

import os
import subprocess
import sys
import threading

import pytest

from dalle_jax import files
from tests.support import ROOT


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


def test_one_process_holds_a_lock_until_it_ends_by_a_kill_too(tmp_path):
    code = "import sys; from dalle_jax import files\nwith files.locked(sys.argv[1]) as free: print(free), input()"
    other = subprocess.Popen([sys.executable, "-uc", code, tmp_path / "lock"], cwd=ROOT, stdin=-1, stdout=-1, text=True)
    assert other.stdout.readline() == "True\n"
    with files.locked(tmp_path / "lock") as free:
        assert not free
    threading.Timer(0.3, other.kill).start()
    with files.locked(tmp_path / "lock", seconds=60) as free:
        assert free and other.wait(60)
