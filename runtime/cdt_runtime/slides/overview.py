"""A picture of the whole slide with the classes over it, and what the colours mean."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cdt_runtime.files import write_synced
from cdt_runtime.slides.colours import Rgb, class_colours
from cdt_runtime.slides.tissue import Small
from cdt_runtime.tile import RGB

SHOW = 0.45
"""How much of a class's colour covers the tissue."""

CANT_TELL: Rgb = (120, 120, 120)
SIDE = 1400
"""Most pixels of the picture's longer side."""

LINE, PAD = 34, 16


def write_overview(
    path: Path,
    small: Small,
    channels: tuple[str, ...],
    labels: NDArray[np.int16],
    looked_at: NDArray[np.bool_],
    classes: Sequence[str],
    shares: Sequence[float],
    side: float,
) -> None:
    """Write the picture.

    Args:
        path: of the PNG.
        small: copy of the slide.
        channels: its channels; markers are shown as the mean of all.
        labels: `(rows, columns)` index of the class, -1 without an answer.
        looked_at: `(rows, columns)`, tiles with tissue.
        classes: K names.
        shares: of the tiles that were looked at: K classes, then those without an answer.
        side: full-size pixels along a tile.
    """
    picture = _base(small, channels)
    colours = (*class_colours(len(classes)), CANT_TELL)
    kind = np.where(looked_at & (labels < 0), len(classes), labels)
    _cover(picture, kind, colours, (side / small.scale[0], side / small.scale[1]))
    image = Image.fromarray(picture)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    names = [
        f"{name}  {share:.0%}" for name, share in zip((*classes, "can't tell"), shares, strict=True)
    ]
    content = io.BytesIO()
    _with_legend(image, names, colours).save(content, "PNG")
    write_synced(path, content.getvalue())


def _base(small: Small, channels: tuple[str, ...]) -> NDArray[np.uint8]:
    """The slide as RGB; what shines is stretched to its brightest hundredth."""
    if channels == RGB:
        return np.rint(np.clip(small.pixels, 0, 1) * 255).astype(np.uint8)
    gray = np.sqrt(small.pixels.mean(axis=2))
    gray = np.clip(gray / max(float(np.quantile(gray, 0.99)), 1e-6), 0, 1)
    return np.repeat(np.rint(gray * 255).astype(np.uint8)[:, :, None], 3, axis=2)


def _cover(
    picture: NDArray[np.uint8],
    kind: NDArray[np.int16],
    colours: Sequence[Rgb],
    side: tuple[float, float],
) -> None:
    """Lay each tile's colour over it, in place."""
    down = np.minimum(np.arange(picture.shape[0]) / side[0], kind.shape[0]).astype(int)
    across = np.minimum(np.arange(picture.shape[1]) / side[1], kind.shape[1]).astype(int)
    framed = np.pad(kind, ((0, 1), (0, 1)), constant_values=-1)
    chosen = framed[down[:, None], across[None]]
    for index, colour in enumerate(colours):
        here = chosen == index
        mixed = picture[here] * (1 - SHOW) + SHOW * np.array(colour)
        picture[here] = np.rint(mixed).astype(np.uint8)


def _with_legend(image: Image.Image, names: Sequence[str], colours: Sequence[Rgb]) -> Image.Image:
    """Set the meaning of the colours below the picture, as many a line as fit."""
    font = ImageFont.load_default(18)
    places, left, top = [], PAD, 0
    for name in names:
        wide = LINE + round(font.getlength(name)) + 2 * PAD
        if left > PAD and left + wide > image.width:
            left, top = PAD, top + LINE
        places.append((left, top))
        left += wide
    whole = Image.new(
        "RGB", (max(image.width, 2 * PAD + 240), image.height + top + LINE + PAD), (255, 255, 255)
    )
    whole.paste(image)
    drawing = ImageDraw.Draw(whole)
    for name, colour, (x, y) in zip(names, colours, places, strict=False):
        middle = image.height + y + LINE // 2 + PAD // 2
        drawing.rectangle((x, middle - 9, x + 18, middle + 9), fill=colour)
        drawing.text((x + 28, middle), name, fill=(30, 30, 30), font=font, anchor="lm")
    return whole
