"""Contact sheets: many images on one page, each above its caption."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dalle_jax.pictures.fonts import fonts_for, letters

MIN_SIDE = 128  # pixels; smaller images are enlarged by a whole factor up to this
_PAPER, _INK, _LINE = (255, 255, 255), (40, 40, 40), (208, 208, 208)
_RIGHT, _WRONG = (30, 150, 70), (205, 40, 40)
_SPACE, _FRAME, _TEXT = 12, 3, 13  # pixels: between cells, width of a marked frame, height of the letters


def contact_sheet(
    images: Sequence[np.ndarray],
    captions: Sequence[str] | None = None,
    *,
    columns: int,
    marks: Sequence[bool] | None = None,
) -> Image.Image:
    """A page of images, row by row; small ones enlarged without smoothing.

    Args:
      images: uint8 [H, W, 3] each; sizes may differ.
      captions: one for each image, wrapped to the width of its cell; None for images alone.
      columns: images in a row.
      marks: one for each image: a green frame for True, a red one for False; None for a thin gray line.

    Raises:
      ValueError: no images, lists of unequal length, or columns below 1.
    """
    if not len(images) or columns < 1:
        raise ValueError(f"expected images and at least 1 column, got {len(images)} and {columns}")
    for name, values in (("captions", captions), ("marks", marks)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"expected one of {name} for each of {len(images)} images, got {len(values)}")
    columns = min(columns, len(images))
    width, height = (max(image.shape[axis] for image in images) for axis in (1, 0))
    scale = max(1, MIN_SIDE // max(width, height))
    width, height = scale * width, scale * height
    lettering = _Lettering(captions or ())
    texts = [wrap(text, lettering.length, width) for text in captions or [""] * len(images)]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    row_heights = [height + (4 + lettering.height * max(len(texts[i]) for i in row) if captions else 0) for row in rows]

    outer = _SPACE + _FRAME
    page_size = (columns * (width + outer) + outer, sum(row_heights) + len(rows) * outer + outer)
    page = Image.new("RGB", page_size, _PAPER)
    pen = ImageDraw.Draw(page)
    top = outer
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, i in enumerate(row):
            image = Image.fromarray(images[i])
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
            left = outer + column * (width + outer) + (width - image.width) // 2
            frame = 1 if marks is None else _FRAME
            color = _LINE if marks is None else _RIGHT if marks[i] else _WRONG
            corners = (left - frame, top - frame, left + image.width + frame - 1, top + image.height + frame - 1)
            pen.rectangle(corners, outline=color, width=frame)
            page.paste(image, (left, top))
            middle = outer + column * (width + outer) + width / 2
            for line, text in enumerate(texts[i]):
                lettering.draw(pen, text, middle=middle, top=top + height + 4 + line * lettering.height)
        top += row_height + outer
    return page


def wrap(text: str, length: Callable[[str], float], width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels: between words, or within a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if length(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and length(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


class _Lettering:
    """Draws text letter by letter in the first font that has the letter: Pillow's for ASCII, then `fonts_for`."""

    def __init__(self, texts: Sequence[str]):
        plain = ImageFont.load_default(_TEXT)
        assert isinstance(plain, ImageFont.FreeTypeFont)  # Pillow's other one has neither sizes nor metrics
        others = {letter for text in texts for letter in text if not letter.isascii()}
        files, _ = fonts_for(others)
        self._fonts = [plain, *(ImageFont.truetype(file, _TEXT) for file in files)]
        self._number: dict[str, int] = {}
        for number, file in enumerate(files, 1):
            self._number = dict.fromkeys(others & letters(file), number) | self._number
        self.height = 1 + max(sum(font.getmetrics()) for font in self._fonts)

    def length(self, text: str) -> float:
        """Width of a line in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def draw(self, pen: ImageDraw.ImageDraw, text: str, *, middle: float, top: float) -> None:
        """A line of text, centered on `middle`."""
        x, baseline = middle - self.length(text) / 2, top + max(font.getmetrics()[0] for font in self._fonts)
        for font, run in self._runs(text):
            pen.text((x, baseline), run, _INK, font, anchor="ls")
            x += font.getlength(run)

    def _runs(self, text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
        """The text in pieces of one font each; a space belongs to the letters before it."""
        runs: list[tuple[int, str]] = []
        for letter in text:
            number = 0 if letter.isascii() else self._number.get(letter, 0)
            if runs and (letter == " " or runs[-1][0] == number):
                runs[-1] = (runs[-1][0], runs[-1][1] + letter)
            else:
                runs.append((number, letter))
        return [(self._fonts[number], run) for number, run in runs]
