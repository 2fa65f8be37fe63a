"""`benchmarks/speed/attention.py` on a device: a call ends in time, the next one goes on, nothing is measured twice."""

import itertools
import json
import types

import pytest


@pytest.fixture
def benchmark(monkeypatch):
    """Its measurements pretended, also the time: every look at the clock takes 50 s."""
    from benchmarks.speed import attention

    measured, clock = [], itertools.count(step=50)

    def measure(programs, arguments, **timing):
        measured.append(arguments)
        return {"xla": 3e-3, "pallas": 2e-3, "cudnn": 3e-3}

    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(attention, "ways", lambda *_, **__: {"xla": print, "pallas": print, "cudnn": print})
    monkeypatch.setattr(attention, "states", lambda heads, batch: [(heads, i) for i in range(4)])
    monkeypatch.setattr(attention, "error", lambda way, kind: 0.0)
    monkeypatch.setattr(attention, "measure", measure)
    attention.calls = measured
    return attention


def call(benchmark, monkeypatch, out, *words):
    monkeypatch.setattr("sys.argv", ["attention.py", "--minutes", "1", "--out", str(out), *words])
    benchmark.main()


def rows(out):
    return [
        (row["kind"], row["heads"], row["way"])
        for row in json.loads((out / "attention.json").read_text())["measured"]["rows"]
    ]


def test_calls_that_end_in_time_make_one_table(benchmark, monkeypatch, tmp_path):
    kinds, ways = len(benchmark.KINDS), 3
    for number in range(1, kinds):
        with pytest.raises(SystemExit, match="not measured yet: .*; give the command again"):
            call(benchmark, monkeypatch, tmp_path)
        assert len(rows(tmp_path)) == number * ways * len(benchmark.HEADS)
        assert len(benchmark.calls) == 2 * number * len(benchmark.HEADS)  # forward, and with backward
    call(benchmark, monkeypatch, tmp_path)
    assert len(set(rows(tmp_path))) == len(rows(tmp_path)) == kinds * ways * len(benchmark.HEADS)
    assert len(benchmark.calls) == 2 * kinds * len(benchmark.HEADS)
    assert "pallas is 1.50 times as fast; it stays" in (tmp_path / "attention.md").read_text()


def test_another_batch_begins_anew(benchmark, monkeypatch, tmp_path):
    for words in ([], ["--batch", "4"]):
        with pytest.raises(SystemExit, match="not measured yet"):
            call(benchmark, monkeypatch, tmp_path, *words)
    assert json.loads((tmp_path / "attention.json").read_text())["measured"]["batch"] == 4
    assert len(rows(tmp_path)) == 3 * len(benchmark.HEADS)
