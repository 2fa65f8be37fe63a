"""Captions of DALL-E mini, step by step by hand, and as dalle-mini 0.1.5 made those of the golden file."""

import json
import math

import pytest

from dalle_jax.text.caption_normalizer import CaptionNormalizer
from tests.support import GOLDEN, text_originals
from tests.text.test_published_tokenizers import random_captions

WORDS = "the\nof\na\nto\nlove\nmy\ncat\nlovemy\nsunset\nsun\nset\n2\n20\n2022\ns\nt"


@pytest.fixture(scope="module")
def normalize():
    return CaptionNormalizer(WORDS)


@pytest.mark.parametrize(
    ("caption", "normalized"),
    [
        ("", " "),
        ("  A  Cat\n", " a cat"),
        ("Caf\xe9 in Zürich, 北京", " cafe in zurich, bei jing"),
        ("Ã©toile &amp;amp; &lt;i&gt;x", " etoile & x"),
        ("a 🐱!", " a, cat face"),
        ("<person> and <person>, <person> run", " people run"),
        ("a <person>'s dog", " a a person 's dog"),
        ("[12] a cat [3] sat [4]", " a cat, 3, sat"),
        ("see <b>this</b> http://x.org/y now", " see this now"),
        ("1,234,567 of 3.5 at 12/31/2022", " 1234567 of 3.5 at 12/31/2022"),
        ("it's don't we'll they're I've I'd 'tis rock'n", " it's don't we'll they're i've i'd \" tis rock \" n"),
        ("well-known a - b", " well known a, b"),
        ("50% & $5 * a/b", " 50 % & $ 5 * a, b"),
        ("what?! (really) [x]; {y} a|b: c=d+e~f", " what, really, x, y, a, b, c, d, e, f"),
        ("'' \"x\" ``y``", ' " x " y "'),
        ("noooo aaa!!!! VIII IIIIX 1111", " no aaa, viii ix 1111"),
        (", a, b,", " a, b"),
        ("a_b \\c #", " a b c"),
    ],
)
def test_steps(normalize, caption, normalized):
    assert normalize(caption) == normalized


@pytest.mark.parametrize(
    ("hashtag", "words"),
    [
        ("#thecat", "the cat"),
        ("#lovemycat", "lovemy cat"),  # log 8 is less than log 5 + log 6
        ("#sunset", "sunset"),
        ("#cat2022", "cat 2022"),
        ("#cat2020", "cat 2020"),  # 20 and 20 are one number
        ("#thexcat", "the x c a t"),  # behind what is no word all costs are infinite
        ("#the_cat", "the cat"),
        ("#__", ""),
        ("#Café", "c a f e"),
    ],
)
def test_hashtags_are_split_into_words(normalize, hashtag, words):
    assert normalize(hashtag) == f" {words}"


def test_costs_are_logarithms_of_ranks(normalize):
    assert math.log(8) < math.log(5) + math.log(6)
    assert normalize._costs["lovemy"] == math.log(8) and normalize._costs["the"] == 0


def test_captions_are_those_of_the_golden_file():
    golden = json.loads((GOLDEN / "text_tokenizers.json").read_text(encoding="utf-8"))
    normalize = CaptionNormalizer("\n".join(golden["words"]))
    for item in golden["captions"]:
        assert normalize(item["caption"]) == item["normalized"], item["caption"]


def test_dalle_mini_agrees_on_many_captions(tmp_path):
    golden = json.loads((GOLDEN / "text_tokenizers.json").read_text(encoding="utf-8"))
    original = text_originals.caption_normalizer(text_originals.write(tmp_path, golden))
    normalize = CaptionNormalizer("\n".join(golden["words"]))
    for caption in random_captions(1_000):
        assert normalize(caption) == original(caption), caption
