"""The paper's filters on captions and image sizes: pairs that are not worth training on, each with a reason.

The paper (section 2.3 and appendix C) drops captions that are too short, not English or boilerplate, and images longer
than twice their width or wider than twice their height; it gives no length threshold. A filtered record is a choice,
not a fault: broken files are `record.REASONS`.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

from dalle_jax.data.record import BadRecord
from dalle_jax.errors import check_number
from dalle_jax.text.bpe import normalize

TOO_SHORT, NOT_ENGLISH, BOILERPLATE = "caption too short", "caption not english", "caption boilerplate"
ASPECT_RATIO, TOO_SMALL = "aspect ratio", "image too small"
# The surer cld3 is of another language, the more English py3langid must find in a caption that stays.
ENGLISH_FLOORS = ((0.99, 0.07), (0.8, 0.004), (0.0, 0.003))
MAX_LIMIT = 1_000_000  # characters, words or pixels that a minimum may ask for
REASONS = (TOO_SHORT, NOT_ENGLISH, BOILERPLATE, ASPECT_RATIO, TOO_SMALL)


def _option(default, words: str):
    """A field with what `dalle-jax data --help` says of it."""
    return dataclasses.field(default=default, metadata={"help": words})


@dataclasses.dataclass(frozen=True)
class Filters:
    """Limits below which records are dropped; the defaults drop nothing."""

    min_caption_characters: int = _option(0, "drop captions of fewer characters")
    min_caption_words: int = _option(0, "drop captions of fewer words")
    english_only: bool = _option(False, "drop captions that are in another language")
    drop_boilerplate: bool = _option(False, "drop captions that are a date, a file name or the like and say nothing")
    max_aspect_ratio: float | None = _option(None, "drop images with a larger ratio of their sides; 2 in the paper")
    min_image_side: int = _option(0, "drop images whose shorter side has fewer pixels")

    @property
    def of_captions(self) -> bool:
        """Whether captions decide on a record, also where a model is trained on images alone."""
        return bool(self.min_caption_characters or self.min_caption_words or self.english_only or self.drop_boilerplate)

    def __post_init__(self):
        for name in ("min_caption_characters", "min_caption_words", "min_image_side"):
            check_number(name, getattr(self, name), min=0, max=MAX_LIMIT, whole=True)
        check_number("max_aspect_ratio", self.max_aspect_ratio, min=1, max=MAX_LIMIT, optional=True)


def good_captions(captions: Sequence[str], width: int, height: int, config: Filters) -> tuple[str, ...]:
    """The captions that pass all filters, in order, of an image of this size in pixels.

    Raises:
      BadRecord: a name of REASONS, that of the first caption if none passes. Without captions only the size counts.
    """
    good: tuple[str, ...] = ()
    reason: str | None = None
    if min(width, height) < config.min_image_side:
        reason = TOO_SMALL
    elif config.max_aspect_ratio and max(width, height) > config.max_aspect_ratio * min(width, height):
        reason = ASPECT_RATIO
    else:
        good = tuple(caption for caption in captions if _fault(caption, config) is None)
        if captions and not good:
            reason = _fault(captions[0], config)
    if reason:
        raise BadRecord(reason, f"{width}x{height} pixels; {' | '.join(captions)[:80]}")
    return good


def _fault(caption: str, config: Filters) -> str | None:
    """The reason to drop this caption, or None. A caption without any text is always too short."""
    text = normalize(caption)
    if not text or len(text) < config.min_caption_characters or len(text.split()) < config.min_caption_words:
        return TOO_SHORT
    if config.drop_boilerplate and is_boilerplate(text):
        return BOILERPLATE
    if config.english_only and not may_be_english(text):
        return NOT_ENGLISH
    return None


def may_be_english(text: str) -> bool:
    """False if py3langid gives English a probability below that of ENGLISH_FLOORS.

    The paper asks cld3 alone. Of captions as short as those of icons, "a bouquet" say, it takes more than half for
    another language, and one in six of the shared photos; so py3langid must agree. Under one in fifty of the English
    captions of each set is dropped (tests/data/test_filters.py), nearly all captions in other scripts are, and about
    half of two-word ones in German, French or Spanish stay.
    """
    english = dict(_langid().rank(text))["en"]
    if english >= ENGLISH_FLOORS[0][1]:
        return True
    found = _cld3().FindLanguage(text)
    other = 0.0 if found.language == "en" else found.probability
    return english >= next(floor for sure, floor in ENGLISH_FLOORS if other >= sure)


@functools.cache
def _langid():
    from py3langid import langid  # a second to load, and few configs need it

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


@functools.cache
def _cld3():
    import gcld3  # of the package cld3-py, which has wheels; the package gcld3 has none

    return gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1000)


def is_boilerplate(text: str) -> bool:
    """Whether this normalized caption is only dates, times, file names, numbers and the words around them."""
    for pattern in (_FILE_NAME, _DATE, _FRAME):
        text = pattern.sub(" ", text)
    return not any(c.isalpha() or not c.isascii() for c in text)


_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_DATE = re.compile(
    "|".join(
        (
            r"\b(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\b,?(?=\s*(?:the\s+)?\d|\s+"
            + _MONTH
            + r"\b)",
            rf"\b{_DAY}(?:\s+of)?[\s\-/.,]*{_MONTH}(?:[\s\-/.,]*\d{{2,4}})?\b",  # 12th of may, 2008; 12-may-08
            rf"\b{_MONTH}\s*{_DAY}(?:\s*,?\s*\d{{4}})?\b",  # may 12th, 2008
            rf"\b{_MONTH}\s*,?\s*\d{{4}}\b",  # may 2008
            r"\b\d{1,4}([\-/.:])\d{1,2}\1\d{1,4}(?:t(?=\d))?",  # 2008-05-12, 12/05/2008, 12.5.08, 2008:05:12
            r"\b\d{1,2}[:.h]\d{2}(?:[:.]\d{2})?(?:\s*[ap]\.?m\b\.?)?(?:\s*(?:z|utc|gmt)\b)?",  # 10:23:45 am
            r"\b\d{1,2}\s*[ap]m\b",
        )
    )
)
_FILE_NAME = re.compile(
    r"\S+\.(?:jpe?g|png|gif|tiff?|bmp|webp|heic|raw|cr2|nef|mp4|mov)\b"
    r"|\b(?:img|dscn?|dscf|pict?|p|mvc|sam|gopr|imag|wp|screenshot|image|photo|picture|untitled)[\s_\-]*\(?\d{2,}"
    r"(?:[_\-]\d+)*\)?"
)
_FRAME = re.compile(  # the words that hold such captions together
    r"\b(?:(?:this|the|an?|my)\s+)?(?:photo(?:graph)?|image|picture|pic|file|scan|screenshot|snapshot|untitled)s?\b"
    r"|\b(?:was|were|is|been|has)\b"
    r"|\b(?:photographed|taken|shot|captured|uploaded|posted|created|added|scanned|modified|published|dated|updated)\b"
    r"|\b(?:on|at|in|the|of|by me|date|time|copy|with my (?:iphone|phone|camera))\b"
)
