"""Which installed fonts draw a text: captions come in every script, and no font has them all.

matplotlib's own DejaVu Sans has Latin, Greek and Cyrillic letters, for example; for Chinese, Japanese or Korean a font
of the system is looked for. Knows nothing of what is drawn.
"""

import functools
from collections.abc import Iterable

# Its glyph for every character is a box with the name of the script.
_PLACEHOLDERS = "Last Resort"


def fonts_for(texts: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Fonts that together draw the texts.

    Returns:
      {name: file}, in the order in which a character's font is to be looked for, matplotlib's own first; and the
      printable characters that no installed font has.
    """
    from matplotlib import font_manager  # a second to import

    manager = font_manager.fontManager
    fonts = {"DejaVu Sans": manager.findfont("DejaVu Sans")}
    missing = {letter for text in texts for letter in text if letter.isprintable()} - letters(fonts["DejaVu Sans"])
    known = {font.fname: font.name for font in manager.ttflist}
    files = sorted(
        {*known, *font_manager.findSystemFonts()} if missing else (), key=lambda file: ("Regular" not in file, file)
    )
    for file in files:
        found = missing & letters(file)
        if found and not known.get(file, "").startswith(_PLACEHOLDERS):
            if file not in known:  # installed after matplotlib made its list
                manager.addfont(file)
                known[file] = manager.ttflist[-1].name
            fonts.setdefault(known[file], file)
            missing -= found
    return fonts, missing


@functools.cache
def letters(file: str) -> frozenset[str]:
    """The characters of a font file; none of a file that is not there any more or cannot be read."""
    from matplotlib import ft2font

    try:
        return frozenset(map(chr, ft2font.FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()
