"""Fonts for captions in any script: no single font has every letter.

Matplotlib brings DejaVu Sans with Latin, Greek and Cyrillic letters; for others the fonts of the system are searched.
"""

import functools
from collections.abc import Iterable

_PLACEHOLDERS = "LastResort"  # a font whose glyph for every character is a box with the name of the script


def fonts_for(texts: Iterable[str]) -> tuple[list[str], set[str]]:
    """Font files that together have the letters of the texts, and the printable letters that no installed font has."""
    missing = {letter for text in texts for letter in text if letter.isprintable()}
    chosen = []
    for file in installed():
        if not missing:
            break
        if found := missing & letters(file):
            chosen.append(file)
            missing -= found
    return chosen, missing


def installed() -> Iterable[str]:
    """Font files in the order in which letters are looked up: DejaVu Sans, regular fonts, others."""
    from matplotlib import font_manager  # a second to import

    yield font_manager.findfont("DejaVu Sans")
    files = [file for file in font_manager.findSystemFonts() if _PLACEHOLDERS not in file]
    yield from sorted(files, key=lambda file: ("Regular" not in file, file))


@functools.cache
def letters(file: str) -> frozenset[str]:
    """The characters that a font file has; none if it cannot be read."""
    from matplotlib import ft2font

    try:
        return frozenset(map(chr, ft2font.FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()
