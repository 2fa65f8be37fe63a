"""Captions from bytes: a text file with one caption per line, or the JSON beside an image.

Text is strict UTF-8, with or without a byte order mark: a caption in another encoding is a fault, not a guess.
"""

import json
import re

from dalle_jax.data.record import BadRecord

FIELDS = ("captions", "caption", "text")  # of JSON and of metadata files; the first that holds text is read


def from_text(data: bytes) -> tuple[str, ...]:
    """The captions of a text file, one per line that is not blank. Lines end at CR and LF and at nothing else.

    Raises:
      BadRecord: 'not utf-8' or 'empty caption'.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord("not utf-8", str(error)) from None
    return checked(re.split(r"\r\n|\n|\r", text))


def from_json(data: bytes) -> tuple[str, ...]:
    """The captions of the JSON beside an image, in one of FIELDS.

    Raises:
      BadRecord: 'bad json', 'no caption', 'empty caption' or 'not utf-8'.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
        raise BadRecord("bad json", f"{type(error).__name__}: {error}") from None
    if not isinstance(fields, dict):
        raise BadRecord("no caption", f"expected a JSON object, got {type(fields).__name__}")
    return from_fields(fields)


def from_fields(fields: dict, *, names: tuple[str, ...] = FIELDS) -> tuple[str, ...]:
    """The captions in the first of the named fields that holds a string or a list with strings.

    Raises:
      BadRecord: 'no caption', 'empty caption' or 'not utf-8'.
    """
    empty = False
    for name in names:
        value = fields.get(name)
        texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        texts = [text for text in texts if isinstance(text, str)]
        if any(text.strip() for text in texts):
            return checked(texts)
        empty = empty or bool(texts)
    if empty:
        raise BadRecord("empty caption")
    raise BadRecord("no caption", f"no text in any of the fields {', '.join(names)}")


def checked(texts: list[str]) -> tuple[str, ...]:
    """Stripped captions without blank ones. "None" counts as blank: some writers make it of a missing caption.

    Raises:
      BadRecord: 'empty caption' if none is left, 'not utf-8' for a lone surrogate, which JSON can spell.
    """
    captions = tuple(stripped for text in texts if (stripped := text.strip()) not in ("", "None"))
    if not captions:
        raise BadRecord("empty caption")
    try:
        for caption in captions:
            caption.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord("not utf-8", str(error)) from None
    return captions
