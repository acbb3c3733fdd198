"""Pictures and HTML of activations: modulated images, heat maps, shaded tokens, tables."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Values = Float[np.ndarray, " token"]
Boxes = Float[np.ndarray, "token 4"]

GREEN = (22, 128, 74)
"""Colour of a fully active text token."""


class Html(str):
    """Text that is HTML already; everything else is escaped where it enters a page."""

    def __html__(self) -> str:
        return str(self)


def escaped(text: object) -> Html:
    """`text` as HTML, unless it is HTML already."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


_CELL = "padding:3px 10px;text-align:left;border-bottom:1px solid #8883;vertical-align:top"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> Html:
    """An HTML table that looks the same in any notebook."""
    top = "".join(f'<th style="{_CELL}">{escaped(name)}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escaped(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    heading = f'<div style="font-weight:600;margin:4px 0">{escaped(title)}</div>' if title else ""
    return Html(
        f'<div style="font-family:system-ui,sans-serif;font-size:13px">{heading}'
        f'<table style="border-collapse:collapse"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def picture(image: Image.Image, width: int | None = None, alt: str = "") -> Html:
    """An image inside the page itself: JPEG for large pictures, PNG for small ones."""
    small = image.width * image.height <= 320 * 320
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG" if small else "JPEG", optimize=True, quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    kind = "png" if small else "jpeg"
    style = f' style="width:{width}px"' if width else ""
    return Html(f'<img{style} alt="{escaped(alt)}" src="data:image/{kind};base64,{data}">')


def enlarged(image: Image.Image, side: int = 256) -> Image.Image:
    """A small image with square pixels, its longer side about `side`; larger ones unchanged."""
    factor = side // max(image.size)
    if factor < 2:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def painted(size: tuple[int, int], boxes: Boxes, level: Values) -> Float[np.ndarray, "row column"]:
    """The highest level among the boxes over each pixel, in 0..1; 0 where there is no box.

    Args:
        size: Width and height of the picture.
        boxes: In pixels of the picture; NaN for tokens that see no single region.
        level: Activation on the 0..10 scale; NaN counts as 0.
    """
    canvas = np.zeros((size[1], size[0]))
    for box, value in zip(boxes, np.nan_to_num(level), strict=True):
        if not np.isnan(box).any():
            left, top, right, bottom = np.rint(box).astype(int)
            patch = canvas[top:bottom, left:right]
            np.maximum(patch, np.clip(value / 10, 0, 1), out=patch)
    return canvas


def modulated(
    image: Image.Image,
    boxes: Boxes,
    level: Values,
    cover: tuple[int, int, int] = (0, 0, 0),
) -> Image.Image:
    """The image under a cover that is more transparent the more active a patch is.

    Source: P1, section 3.3. Opacity of the cover is 1 - a/10 on the 0..10 scale; what no
    token sees is covered.
    """
    clear = painted(image.size, boxes, level)[..., None]
    pixels = np.asarray(image.convert("RGB"), float)
    mixed = pixels * clear + np.array(cover, float) * (1 - clear)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def heat_map(image: Image.Image, boxes: Boxes, level: Values) -> Image.Image:
    """The image in grey with active patches glowing from red to yellow."""
    heat = painted(image.size, boxes, level)[..., None]
    grey = np.asarray(image.convert("L").convert("RGB"), float) * 0.75
    glow = np.concatenate(
        [np.full_like(heat, 255), 40 + 200 * heat, np.full_like(heat, 30)], axis=-1
    )
    mixed = grey * (1 - 0.85 * heat) + glow * 0.85 * heat
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def shaded(pieces: Sequence[str], level: Values) -> Html:
    """Text whose tokens are the darker green the more active; hover shows the value.

    Args:
        pieces: Text of each token.
        level: Activation on the 0..10 scale; NaN where there is none to show.
    """
    spans = []
    for piece, value in zip(pieces, level, strict=True):
        strength = float(np.clip(np.nan_to_num(value) / 10, 0, 1))
        ink = "#fff" if strength > 0.6 else "inherit"
        title = "" if np.isnan(value) else f' title="{value:.2f}"'
        word = piece.lstrip(" ")
        spans.append(
            f"{' ' * (len(piece) - len(word))}<span{title} "
            f'style="background:rgba{(*GREEN, round(strength, 3))};color:{ink}">'
            f"{escaped(word)}</span>"
        )
    return Html(f'<span style="white-space:pre-wrap;line-height:1.7">{"".join(spans)}</span>')


def figure(
    pictures: Sequence[Image.Image], pieces: Sequence[str], level: Values, title: str
) -> Image.Image:
    """Pictures side by side with the shaded tokens below, as one image.

    Source: the arrangement of P1, Figure 1.
    """
    height = max(picture.height for picture in pictures)
    gap, size = 10, 15
    width = max(480, sum(p.width + gap for p in pictures) + gap)
    font = ImageFont.load_default(size)
    words = _lines(pieces, level, font, width - 2 * gap)
    sheet = Image.new("RGB", (width, height + 3 * gap + 22 + len(words) * 24), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap // 2), title, fill="black", font=font)
    left = gap
    for each in pictures:
        sheet.paste(each.convert("RGB"), (left, gap + 22))
        left += each.width + gap
    for row, line in enumerate(words):
        x, y = float(gap), height + 2 * gap + 22 + row * 24
        for piece, value in line:
            word = piece.lstrip(" ")
            x += draw.textlength(" " * (len(piece) - len(word)), font=font)
            strength = float(np.clip(np.nan_to_num(value) / 10, 0, 1))
            ground = tuple(round(255 + (c - 255) * strength) for c in GREEN)
            end = x + draw.textlength(word, font=font)
            draw.rectangle((x, y, end, y + 20), fill=ground)
            draw.text((x, y), word, fill="white" if strength > 0.6 else "black", font=font)
            x = end
    return sheet


def _lines(
    pieces: Sequence[str],
    level: Values,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    width: int,
) -> list[list[tuple[str, float]]]:
    lines: list[list[tuple[str, float]]] = [[]]
    used = 0.0
    for piece, value in zip(pieces, level, strict=True):
        text = piece.replace("\n", "\u23ce")
        length = font.getlength(text)
        if used + length > width and lines[-1]:
            lines.append([])
            used = 0.0
        lines[-1].append((text, float(value)))
        used += length
    return lines


def levels(values: Float[np.ndarray, "*axes"], maximum: float) -> Float[np.ndarray, "*axes"]:
    """Raw activations on the 0..10 scale of a neuron with that maximum, not rounded.

    Source: P1, appendix A: negative values are 0, the maximum is 10; values above it (a
    re-recorded sample may exceed it by rounding) are clipped.
    """
    if maximum <= 0:
        return np.where(np.isnan(values), np.nan, 0.0)
    return np.asarray(np.clip(values, 0, maximum) / maximum * 10)


def stretched(boxes: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    """Boxes of an enlarged picture."""
    return boxes * factor
