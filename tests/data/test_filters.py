"""The filters: each drops what it is for, keeps what it is not for, and is off unless asked."""

import math
import re
import tarfile

import numpy as np
import pytest

from dalle_jax.data import filters
from dalle_jax.data.filters import Filters, good_captions
from dalle_jax.data.pipeline import DataConfig, Prepare
from dalle_jax.data.record import BadRecord, Dropped, Record
from dalle_jax.errors import UserError
from dalle_jax.text.bpe import normalize
from tests.support import ROOT

SHARED = ROOT / "../shared/data"
GOOD = "two brown dogs playing in the snow"


def check(captions, width, height, config):
    """The reason to drop a record, or None."""
    try:
        assert good_captions(captions, width, height, config) or not captions
    except BadRecord as bad:
        return bad.reason


def test_everything_is_off_by_default():
    for caption in ("x", "taken on 2008-05-12", "두 마리의 개가 눈밭에서 놀고 있다"):
        assert check((caption,), 1, 5000, Filters()) is None


@pytest.mark.parametrize(
    ("limits", "reason", "beyond", "within"),  # records: caption, width, height
    [
        ({}, filters.TOO_SHORT, [(" \x00", 10, 10)], []),
        ({"min_caption_words": 3}, filters.TOO_SHORT, [("red apple", 10, 10)], [("a red apple", 10, 10)]),
        ({"min_caption_characters": 9}, filters.TOO_SHORT, [(" red appl\n", 10, 10)], [("red apple", 10, 10)]),
        ({"max_aspect_ratio": 2.0}, filters.ASPECT_RATIO, [(GOOD, 10, 21), (GOOD, 21, 10)],
         [(GOOD, 10, 20), (GOOD, 20, 10), (GOOD, 10, 10)]),
        ({"min_image_side": 64}, filters.TOO_SMALL, [(GOOD, 500, 63), (GOOD, 63, 500)], [(GOOD, 64, 64)]),
    ],
)  # fmt: skip
def test_a_limit_keeps_what_reaches_it(limits, reason, beyond, within):
    config = Filters(**limits)
    assert {check((caption,), *size, config) for caption, *size in beyond} == {reason}
    assert {check((caption,), *size, config) for caption, *size in within} <= {None}


# Filter -> reason to drop a caption, or None -> captions.
CAPTIONS = {
    ("drop_boilerplate", filters.BOILERPLATE): [
        "Photographed on 12 May 2008",
        "photographed on May 12th, 2008",
        "Picture taken on Sunday, 12th of May 2008 at 10:23 am",
        "taken on 2008-05-12",
        "Image uploaded on 12/05/2008 10:23",
        "photo taken in May 2008",
        "12.05.2008",
        "Sat Mar 3 2012",
        "2008:05:12 10:11:12",
        "2019-03-04T11:22:33Z",
        "IMG_1234",
        "IMG_20190304_112233.jpg",
        "dsc00123.JPG",
        "P1010023",
        "Screenshot 2019-01-02 at 10.11.12",
        "Untitled-3",
        "photo",
        "1984",
    ],
    ("drop_boilerplate", None): [
        GOOD,
        "a dog photographed on 12 May 2008",
        "march of the penguins",
        "2 march hares",
        "may",
        "sunday roast",
        "date palm",
        "a picture of a cat",
        "the number 7",
        "clock showing 10:10",
        "route 66",
        "🙂",
        "사진",
    ],
    ("english_only", filters.NOT_ENGLISH): [
        "두 마리의 개가 눈밭에서 놀고 있다",
        "雪の中で遊ぶ二匹の茶色い犬",
        "две коричневые собаки играют в снегу",
        "zwei braune Hunde spielen zusammen im Schnee vor dem Haus",
        "deux chiens bruns jouent dans la neige devant la maison",
        "dos perros marrones juegan en la nieve delante de la casa",
        "كلبان بنيان يلعبان في الثلج",
        "ein rotes auto",
        "chat noir",
        "maison bleue",
        "la tour eiffel de nuit",
        "kopfschütteln",
    ],
    ("english_only", None): [
        GOOD,
        "a kaaba, emojitwo style",
        "man (bro, adult), emojitwo style",
        "a red circle above a blue square",
        "small purple star",
        "an espresso in a red cup on a wooden table",
        "a bouquet",
        "fog",
    ],
}


@pytest.mark.parametrize(
    ("option", "reason", "caption"), [(*case, caption) for case, captions in CAPTIONS.items() for caption in captions]
)
def test_captions_are_dropped_or_stay(option, reason, caption):
    """Dates, file names and the like are boilerplate, descriptions with them are not; short English captions stay."""
    assert check((caption,), 10, 10, Filters(**{option: True})) == reason


def english_captions(data):
    """Set -> English captions of the shared data."""
    lines = [line for path in data.glob("photos/folder/images/*.txt") for line in path.read_text().splitlines()]
    sets = {"photos": [line for line in lines if line.strip()]}
    for name in ("emoji", "tiles", "nlvr"):
        with tarfile.open(data / f"{name}.tar.xz") as pack:
            shards = [member for member in pack if re.search(r"/(train|val[^/]*)/\d+\.tar$", member.name)]
            for shard in shards:
                with tarfile.open(fileobj=pack.extractfile(shard)) as pictures:
                    texts = [pictures.extractfile(member) for member in pictures if member.name.endswith(".txt")]
                    sets.setdefault(name, []).extend(text.read().decode() for text in texts)
    return sets


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared captions are not here: {SHARED}")
def test_few_english_captions_are_lost():
    """The cost of the floors, which were chosen on these captions, and what cld3 alone would cost."""
    alone = {}
    for name, captions in english_captions(SHARED).items():
        texts = [normalize(caption) for caption in captions]
        lost = [text for text in texts if not filters.may_be_english(text)]
        alone[name] = sum(filters._cld3().FindLanguage(text).language != "en" for text in texts) / len(texts)
        print(f"{name}: {len(lost)} of {len(texts)}, {len(lost) / len(texts):.2%}; cld3 alone {alone[name]:.1%}")
        assert len(texts) > 100 and len(lost) < 0.02 * len(texts), lost[:10]
    assert alone["emoji"] > 0.5 and alone["photos"] > 0.15


PAPER = {"min_caption_words": 2, "english_only": True, "drop_boilerplate": True, "max_aspect_ratio": 2.0}


def test_a_dvae_leaves_out_what_its_filters_leave_out_of_captioned_data():
    image = np.zeros((9, 9, 3), np.uint8)

    def reason(captions, **limits):
        prepare = Prepare(DataConfig(image_size=8, **limits))
        found = prepare(Record("key", image, captions), np.random.default_rng(0), at_random=True)
        return found.reason if isinstance(found, Dropped) else None

    assert (
        reason(("photo taken in May 2008",), **PAPER) == filters.BOILERPLATE
        and reason(("dog",), **PAPER) == filters.TOO_SHORT
    )
    assert reason((GOOD,), **PAPER) is None and reason((), **PAPER) is None
    assert reason(("\x00",)) is None and reason(("\x00",), max_aspect_ratio=2.0) is None, "captions are not asked"


def test_one_good_caption_keeps_the_record():
    config = Filters(min_caption_words=2, drop_boilerplate=True)
    assert check(("dog", GOOD), 10, 10, config) is None
    assert good_captions(("dog", GOOD, "IMG_1234 1234"), 10, 10, config) == (GOOD,)
    assert check(("IMG_1234 5", "dog"), 10, 10, config) == filters.BOILERPLATE  # the first caption gives the reason


@pytest.mark.parametrize(
    ("name", "value"),
    [("min_caption_words", -1), ("max_aspect_ratio", 0.5), ("max_aspect_ratio", math.nan), ("min_image_side", 10**9)],
)
def test_impossible_limits(name, value):
    with pytest.raises(UserError, match=f"expected {name} to be a .*, got {value}"):
        Filters(**{name: value})
