"""Files that an evaluation or an import reads back, with any value anywhere: what they say, or one sentence."""

import contextlib
import copy
import functools
import json

from hypothesis import strategies as st

from dalle_jax.convert.clip import read_settings
from dalle_jax.errors import UserError
from dalle_jax.evaluate import drawing, report
from dalle_jax.evaluate.protocol import DIGESTS, Draw, Evaluation, Metrics
from tests.support.fuzz import few_and, fuzz

MISSING = object()
ODD = [MISSING, None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "x", "\udcff", [], {}, [1], {"a": 1}]
EVALUATION = Evaluation(protocol="x", source="coco:x", draw=Draw(count=5, best_of=2), measure=Metrics(blur=(0.0, 1.0)))
REPORT = {
    "evaluation": EVALUATION.to_json(),
    "scores": {"fid": 1.0},
    "versions": {"dalle-jax": "0.2.0"},
    "weights": "ab",
    "pictures": {"sha256": "cd"},
}
PLAN = {
    "ids": ["a#0", "a#1"],
    "captions": ["x", "y"],
    "settings": {"draw": {"seed": 0, "best_of": None}, "checkpoint": "ab"},
    "dropped": {},
    "records": 1,
}
CLIP = {
    "config": {"vision_config": {"hidden_act": "quick_gelu", "num_attention_heads": 4}, "text_config": {}},
    "preprocessor_config": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]},
}


def paths(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


def damaged(value):
    """The value with one to three of its parts replaced or left out."""

    def damage(edits):
        whole = {"": copy.deepcopy(value)}
        for path, odd in edits:
            *way, last = ("", *path)
            with contextlib.suppress(LookupError, TypeError):  # an edit before has taken this part away
                holder = functools.reduce(lambda part, key: part[key], way, whole)
                holder[last]
                if odd is not MISSING:
                    holder[last] = copy.deepcopy(odd)
                elif path:
                    del holder[last]
        return whole[""]

    edit = st.tuples(st.sampled_from(list(paths(value))), st.sampled_from(ODD))
    return st.lists(edit, min_size=1, max_size=3).map(damage)


def refused(read, *args) -> bool:
    try:
        read(*args)
    except UserError as error:
        assert str(error).count("\n") == 0
        return True
    return False


@few_and(5_000)
def test_a_report_is_what_it_says_or_refused(inputs, tmp_path):
    def check(values):
        (tmp_path / "report.json").write_text(json.dumps(values))
        if not refused(report.load, tmp_path / "report.json"):
            expected = report.load(tmp_path / "report.json").expected
            assert all(refused(expected.check, name, "else") for name in DIGESTS)

    fuzz(check, damaged(REPORT), inputs=inputs)


@few_and(5_000)
def test_a_plan_has_a_seed_for_each_caption_or_is_refused(inputs, tmp_path):
    def check(values):
        (tmp_path / "plan.json").write_text(json.dumps(values))
        if not refused(drawing.load, tmp_path / "plan.json"):
            plan = drawing.load(tmp_path / "plan.json")
            assert len(plan.summary()["seeds"]) <= len(plan.captions) > 0

    fuzz(check, damaged(PLAN), inputs=inputs)


@few_and(5_000)
def test_settings_of_a_published_clip_are_numbers_or_refused(inputs, tmp_path):
    def check(values):
        for name, value in (values if isinstance(values, dict) else {}).items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        if not refused(read_settings, tmp_path):
            assert json.dumps(read_settings(tmp_path), allow_nan=False)

    fuzz(check, damaged(CLIP), inputs=inputs)
