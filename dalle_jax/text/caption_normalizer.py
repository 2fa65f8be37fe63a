"""The captions that DALL-E mini and mega were trained on, made of any text: lower-case ASCII words, commas and quotes.

The steps are those of dalle_mini/model/text.py in dalle-mini 0.1.5, with two differences. <person>, which stands for a
name in one of its data sets, becomes 'a person' always, where the original draws 'someone' and 'somebody' at times: a
caption has one encoding. And a run of more than 1,000 digits is cut there.
"""

import functools
import math
import re

from dalle_jax.errors import UserError
from dalle_jax.text.clip import mend
from dalle_jax.text.published import INSTALL

# They keep a dot, an apostrophe and a slash from what becomes of punctuation. Their letters matter where a hashtag
# holds one, as it is split with them.
_DOT, _APOSTROPHE, _SLASH = "xtokxdotxtokx", "xtokxquotextokx", "xtokxslashxtokx"

_BEFORE_HASHTAGS = (
    (r"<person>(?:[,\s]*(?:(?:and)+[,\s]*)?<person>)+", " people "),
    (r"<person>", " a person "),
    (r"\A\s*\[\d+\]", ""),  # a reference of Wikipedia
    (r"\[\d+\]\s*\Z", ""),
    (r"<[^<]+?>", " "),
    (r"http\S+", ""),
    (r"(\d),(\d{3})", r"\1\2"),  # twice, because neighbors share digits
    (r"(\d),(\d{3})", r"\1\2"),
    (r"(\w)\.(\w)", rf"\1{_DOT}\2"),
    (r"'(?=(?:[stdm]|ll|re|ve)\b)", _APOSTROPHE),
    (r"(\d)/(\d)", rf"\1{_SLASH}\2"),  # a date
    (r"(\w)-(\w)", r"\1 \2"),
    (r"([%&/$*])", r" \1 "),
)
_AFTER_HASHTAGS = (
    (r"[_#\\]", " "),
    (r"['\"`]", ' " '),
    (r"[()\[\].,|:;?!=+~\-/{}]", ","),
    (_DOT, "."),
    (_APOSTROPHE, "'"),
    (_SLASH, "/"),
    (r"(\D)\1{3,}", r"\1"),  # not of three, which Roman numbers have
    (r"\s+", " "),
    (r"\s*\"[\s\"]*", ' " '),
    (r"\s*,[\s,]*", ", "),
)


class CaptionNormalizer:
    """A function of a caption.

    words: one a line, the most frequent first: a hashtag is split into those that are most likely together, as if a
    word's probability were 1 / its rank.
    """

    def __init__(self, words: str):
        try:
            import emoji
            import unidecode
        except ImportError as error:
            raise UserError(f"dalle-mini's captions take the packages emoji and unidecode, {INSTALL}") from error
        self._words, self._demojize, self._to_ascii = words, emoji.demojize, unidecode.unidecode

    def __call__(self, caption: str) -> str:
        """The normalized caption, behind a space."""
        text = self._to_ascii(self._demojize(mend(caption))).lower()
        for pattern, replacement in _BEFORE_HASHTAGS:
            text = re.sub(pattern, replacement, text)
        text = re.sub(r"#(\w+)", lambda match: self._split_hashtag(match[1]), text)
        for pattern, replacement in _AFTER_HASHTAGS:
            text = re.sub(pattern, replacement, text)
        return " " + text.strip().removesuffix(",").removeprefix(",").strip()

    @functools.cached_property
    def _costs(self) -> dict[str, float]:
        return {word: math.log(rank) for rank, word in enumerate(self._words.split("\n"), start=1)}

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self._costs))

    def _split_hashtag(self, text: str) -> str:
        return " ".join(self._split_word(word) for word in re.findall("[a-z0-9]+", text))

    def _split_word(self, text: str) -> str:
        """The words of least total cost with spaces between, but for those between digits. What no words make is
        spelled in single characters."""
        best = [(0.0, 0)]  # of each beginning of the text: its cost, and the length of its last word
        for end in range(1, len(text) + 1):
            lengths = range(1, min(end, self._longest) + 1)
            best.append(min((best[end - n][0] + self._costs.get(text[end - n : end], math.inf), n) for n in lengths))
        words, end = [], len(text)
        while end:
            words.append(text[end - best[end][1] : end])
            end -= best[end][1]
        return re.sub(r"(?<=\d) (?=\d)", "", " ".join(reversed(words)))
