"""The ledger of a run's time."""

import json
import types

import jax
import numpy as np
import pytest
from PIL import Image

from dalle_jax.pictures import plot
from dalle_jax.train.monitor import goodput
from dalle_jax.train.step import TrainStep
from tests.support.line_task import train


def test_the_ledger_books_every_second_once(tmp_path, monkeypatch):
    now = types.SimpleNamespace(t=100.0)
    clock = types.SimpleNamespace(monotonic=lambda: now.t, time=lambda: 1000 + now.t)
    monkeypatch.setattr(goodput, "time", clock)

    def passes(seconds):
        now.t += seconds

    ledger = goodput.Ledger(tmp_path)
    passes(3)  # init
    ledger.restored(0)
    ledger.enter("compile")
    passes(4)
    ledger.enter("step")
    passes(50)
    with ledger.during("checkpoint"):
        passes(2)
        ledger.saved(10)
    passes(21)
    ledger.move("data", 1)
    with ledger.during("look"):
        passes(7)
    with ledger.during("sample"):
        passes(5)
    ledger.write()  # and the process is killed
    passes(9)

    ledger = goodput.Ledger(tmp_path)
    passes(1)
    ledger.restored(10)
    ledger.enter("step")
    passes(20)
    ledger.write(ended=True)
    passes(10_000)  # the person comes back the next day
    expected = {"init": 4, "compile": 4, "step": 70, "data": 1, "checkpoint": 2, "look": 7, "lost": 20, "down": 9}
    expected |= {"sample": 5}
    assert goodput.Ledger(tmp_path).seconds == expected
    found = goodput.read(tmp_path)
    assert found["starts"] == 3 and found["goodput"] == pytest.approx(70 / 115)


def test_a_ledger_that_cannot_be_read_begins_again(tmp_path):
    path = tmp_path / goodput.FILE
    assert goodput.Ledger(tmp_path).starts == 1
    good = json.loads(path.read_text())
    odd = [good | {key: value} for key in good for value in (None, [], "x") if key != "ended"]
    for text in ["{", "null", "\udcff", *map(json.dumps, odd)]:
        path.write_bytes(text.encode(errors="surrogateescape"))
        assert goodput.Ledger(tmp_path).starts == 1 and goodput.Ledger(tmp_path).starts == 2
    path.write_text(json.dumps(good | {"marks": {"x": 1.0}, "seconds": {"other": 1.0}}))
    assert goodput.Ledger(tmp_path).seconds["step"] == 0


def test_the_picture_has_a_bar_of_every_kind(tmp_path, monkeypatch):
    train(tmp_path, steps=4)
    picture = np.asarray(Image.open(tmp_path / goodput.PICTURE).convert("RGB"))
    assert (picture != 255).any()
    goodput.draw(goodput.Ledger(tmp_path / "new"), updates=0, path=tmp_path / "empty.png")  # nothing to divide by

    drawn = {}
    monkeypatch.setattr(plot, "save_bars", lambda path, values, **more: drawn.update(values))
    ledger = goodput.Ledger(tmp_path)
    ledger.seconds.update({kind: 10.0 * index for index, kind in enumerate(goodput.KINDS)})
    goodput.draw(ledger, updates=4, path=tmp_path / goodput.PICTURE)
    assert {name.partition(":")[0]: seconds for name, seconds in drawn.items()} == ledger.seconds


def test_no_number_is_waited_for_before_the_next_update_is_dispatched(tmp_path, monkeypatch):
    order, jitted, get = [], TrainStep.update.func, jax.device_get

    def noted(step):
        update = jitted(step)
        return lambda *args: (order.append("update"), update(*args))[1]

    def get_noted(tree):
        if isinstance(tree, dict) and "grad_norm" in tree:
            order.append("wait")
        return get(tree)

    monkeypatch.setattr(TrainStep, "update", property(noted))
    monkeypatch.setattr(jax, "device_get", get_noted)
    train(tmp_path, steps=4, log_every=1, checkpoint_every=None)
    assert order == ["update", "update", "wait", "update", "wait", "update", "wait", "wait"]
