"""Which pairs are not worth training on: the paper's filters on captions and picture sizes, each with a reason.

The paper (section 2.3 and appendix C) drops captions that are too short, not English or boilerplate, and pictures
longer than twice their width or the other way round; it gives no length threshold. Knows nothing of broken files:
a filtered record is a choice, not a fault.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

from dalle_jax.text.bpe import normalize

TOO_SHORT, NOT_ENGLISH, BOILERPLATE = "caption too short", "caption not english", "caption boilerplate"
ASPECT_RATIO, TOO_SMALL = "aspect ratio", "image too small"
ENGLISH_FLOOR = 0.003  # see `may_be_english`
REASONS = (TOO_SHORT, NOT_ENGLISH, BOILERPLATE, ASPECT_RATIO, TOO_SMALL)


@dataclasses.dataclass(frozen=True)
class Filters:
    """What to drop; the defaults drop nothing.

    min_caption_characters, min_caption_words: shorter captions are dropped; 0 is off.
    english_only: drop captions that are surely in another language; short English captions are safe.
    drop_boilerplate: drop captions that are a date, a file name or the like and describe nothing.
    max_aspect_ratio: longer side over shorter side, 2.0 in the paper; 0 is off.
    min_image_side: shorter side in pixels; 0 is off.
    """

    min_caption_characters: int = 0
    min_caption_words: int = 0
    english_only: bool = False
    drop_boilerplate: bool = False
    max_aspect_ratio: float = 0.0
    min_image_side: int = 0

    def __post_init__(self):
        if min(self.min_caption_characters, self.min_caption_words, self.min_image_side) < 0:
            raise ValueError("filter limits must not be negative; 0 switches a filter off")
        if self.max_aspect_ratio and self.max_aspect_ratio < 1:
            raise ValueError(f"max_aspect_ratio must be at least 1, or 0 for off, got {self.max_aspect_ratio}")


def check(captions: Sequence[str], width: int, height: int, config: Filters) -> str | None:
    """Why this record is dropped, or None. One good caption keeps it; without any, only the size counts."""
    reason = check_size(width, height, config)
    if reason is None and captions and not good_captions(captions, config):
        return check_caption(captions[0], config)
    return reason


def check_size(width: int, height: int, config: Filters) -> str | None:
    """Why a picture of this size in pixels is dropped, or None."""
    if min(width, height) < config.min_image_side:
        return TOO_SMALL
    if config.max_aspect_ratio and max(width, height) > config.max_aspect_ratio * min(width, height):
        return ASPECT_RATIO
    return None


def good_captions(captions: Sequence[str], config: Filters) -> tuple[str, ...]:
    """The captions that no filter drops, in order."""
    return tuple(caption for caption in captions if check_caption(caption, config) is None)


def check_caption(caption: str, config: Filters) -> str | None:
    """Why this caption is dropped, or None. A caption without any text is always too short."""
    text = normalize(caption)
    if not text or len(text) < config.min_caption_characters or len(text.split()) < config.min_caption_words:
        return TOO_SHORT
    if config.drop_boilerplate and is_boilerplate(text):
        return BOILERPLATE
    if config.english_only and not may_be_english(text):
        return NOT_ENGLISH
    return None


def may_be_english(text: str) -> bool:
    """False only where the language identifier gives English less than ENGLISH_FLOOR.

    Short captions are hard for every identifier, so the most likely language is no criterion: it is not English for
    a quarter of drawn-icon captions such as "a kaaba, emojitwo style". The floor errs on the side of keeping: few
    English captions are lost, most captions in other scripts are found, and many two-word ones in German, French or
    Spanish stay. lingua finds more of those, for several times the memory and time a caption.
    """
    return dict(_identifier().rank(text))["en"] >= ENGLISH_FLOOR


@functools.cache
def _identifier():
    from py3langid import langid  # takes a second to load, and few configs ask for it

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def is_boilerplate(text: str) -> bool:
    """Is there nothing in this normalized caption but dates, times, file names, numbers and the words around them?"""
    text = _FILE_NAME.sub(" ", text)
    text = _DATE.sub(" ", text)
    text = _FRAME.sub(" ", text)
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
