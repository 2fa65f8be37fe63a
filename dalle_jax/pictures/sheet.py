"""Contact sheets: many pictures with their captions on one page, for people to look at.

Knows how to lay out and letter a page; does not know where the pictures came from.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dalle_jax.pictures.fonts import fonts_for, letters

_PAPER, _INK, _LINE = (255, 255, 255), (40, 40, 40), (208, 208, 208)
_RIGHT, _WRONG = (30, 150, 70), (205, 40, 40)
_SPACE, _FRAME, _TEXT = 12, 3, 13  # pixels: between cells, width of a marked frame, height of the letters


def contact_sheet(
    images: Sequence[np.ndarray],
    captions: Sequence[str] | None = None,
    *,
    columns: int,
    scale: int = 1,
    marks: Sequence[bool] | None = None,
) -> Image.Image:
    """A page of pictures, row by row, each above its caption.

    Args:
      images: uint8 [H, W, 3] each; sizes may differ.
      captions: one a picture, wrapped to the width of the cell; None for pictures alone.
      columns: pictures in a row.
      scale: whole factor by which every picture is enlarged, without smoothing.
      marks: one a picture: a green frame for True, a red one for False; None for a thin grey line.

    Raises:
      ValueError: no pictures, lists of unequal length, columns or scale below 1.
    """
    if not len(images) or columns < 1 or scale < 1:
        raise ValueError(f"expected pictures, columns and scale of at least 1, got {len(images)}, {columns}, {scale}")
    for name, values in (("captions", captions), ("marks", marks)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"expected one of {name} for each of {len(images)} pictures, got {len(values)}")
    columns = min(columns, len(images))
    fonts = [_font(text) for text in captions or ()]
    width = scale * max(image.shape[1] for image in images)
    height = scale * max(image.shape[0] for image in images)
    texts = [wrap(text, font, width) for text, font in zip(captions or (), fonts, strict=True)] or [[]] * len(images)
    line_height = max((sum(font.getmetrics()) for font in fonts), default=0) + 1
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    row_heights = [height + line_height * max(len(texts[i]) for i in row) + (4 if captions else 0) for row in rows]

    outer = _SPACE + _FRAME
    page_size = (columns * (width + outer) + outer, sum(row_heights) + len(rows) * outer + outer)
    page = Image.new("RGB", page_size, _PAPER)
    pen = ImageDraw.Draw(page)
    top = outer
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, i in enumerate(row):
            picture = Image.fromarray(images[i])
            picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
            left = outer + column * (width + outer) + (width - picture.width) // 2
            frame = 1 if marks is None else _FRAME
            colour = _LINE if marks is None else _RIGHT if marks[i] else _WRONG
            corners = (left - frame, top - frame, left + picture.width + frame - 1, top + picture.height + frame - 1)
            pen.rectangle(corners, outline=colour, width=frame)
            page.paste(picture, (left, top))
            for line, text in enumerate(texts[i]):
                middle = outer + column * (width + outer) + width / 2
                pen.text((middle, top + height + 4 + line * line_height), text, _INK, fonts[i], anchor="ma")
        top += row_height + outer
    return page


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks a text into lines of at most `width` pixels, between words where possible and within a word if not."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _font(text: str) -> ImageFont.FreeTypeFont:
    """Pillow's own font for plain Latin letters, otherwise the installed one that has the most of the text's."""
    if text.isascii():
        return ImageFont.load_default(_TEXT)
    fonts, _ = fonts_for([text])
    return ImageFont.truetype(max(fonts.values(), key=lambda file: len(letters(file) & set(text))), _TEXT)
