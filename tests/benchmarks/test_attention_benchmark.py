"""`benchmarks/speed/attention.py` on a device: a call ends in time, the next one goes on, nothing is measured twice."""

import itertools
import types

import pytest

from benchmarks.speed import attention


@pytest.fixture
def measured(monkeypatch):
    """What was measured, which is pretended, also the time: every look at the clock takes 50 s."""
    calls, clock = [], itertools.count(step=50)

    def measure(programs, arguments, **timing):
        calls.append(arguments)
        return {"xla": 3e-3, "pallas": 2e-3, "cudnn": 3e-3}

    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(attention, "ways", lambda *_, **__: {"xla": print, "pallas": print, "cudnn": print})
    monkeypatch.setattr(attention, "states", lambda heads, batch: [(heads, i) for i in range(4)])
    monkeypatch.setattr(attention, "error", lambda way, kind: 0.0)
    monkeypatch.setattr(attention, "measure", measure)
    return calls


def test_calls_that_end_in_time_make_one_table(measured, monkeypatch, tmp_path, capsys):
    words = ["attention.py", "--minutes", "1", "--out", str(tmp_path), "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    kinds, ways = len(attention.KINDS), 3
    for number in range(1, kinds + 1):
        assert attention.main() == int(number < kinds)
        assert ("not measured yet" in capsys.readouterr().out) == (number < kinds)
        rows = [line for line in (tmp_path / "attention.md").read_text().splitlines() if line.count("|") == 8][2:]
        assert len(set(rows)) == len(rows) == number * ways * len(attention.HEADS)
        assert len(measured) == 2 * number * len(attention.HEADS)  # forward, and with backward
    assert "pallas is 1.50 times as fast; it stays" in (tmp_path / "attention.md").read_text()
    monkeypatch.setattr("sys.argv", [*words, "--batch", "4"])  # another batch begins anew
    assert attention.main() == 1
    assert len(measured) == 2 * (kinds + 1) * len(attention.HEADS)
