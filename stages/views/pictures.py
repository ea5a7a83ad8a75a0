"""Pictures for people: a grid of samples, and real images with their patches and entropies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from stages.images.names import shown
from stages.runtime.arrays import PixelBatch, Pixels
from stages.runtime.artifact import write_atomic

_MARGIN = 6
_BACKGROUND = (255, 255, 255)
_INK = (40, 40, 40)
_FRAME = (200, 200, 200)
_OUTLINE = (214, 39, 40)
_SCALE = 3  # enlargement of small samples
_VISIBLE = 192  # smallest side of a single picture
_SMALL = 128  # samples below this side are enlarged
_CAPTION = 13  # height of the text below a picture
_LABEL_LETTERS = 30  # widest label, in heights of its letters; a folder's name may have 255 characters
_TOKEN_PIXELS = 24  # smallest side of a token in the patch picture
# Viridis, dark blue to yellow: lightness rises with entropy, so the map is readable without colour vision.
_HEAT = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)


def sample_grid(
    rows: Mapping[str, UInt8[NDArray[np.uint8], "_ height width 3"]], image_size: int, columns: int
) -> Image.Image:
    """One row per class: its name on the left, then at most `columns` of its images.

    Args:
        rows: Images of each class, maybe none.
        image_size: Height and width, pixels.
        columns: Largest number of images in a row.
    """
    side = image_size * (_SCALE if image_size < _SMALL else 1)
    letters = max(14, side // 9)
    font = ImageFont.load_default(size=letters)
    labels = [_shortened(shown(name), font, _LABEL_LETTERS * letters) for name in rows]
    text_width = int(max(font.getlength(label) for label in labels)) + 3 * _MARGIN
    step = side + _MARGIN
    canvas = Image.new("RGB", (text_width + columns * step, len(rows) * step + _MARGIN), _BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for row, (label, images) in enumerate(zip(labels, rows.values(), strict=True)):
        top = _MARGIN + row * step
        pen.text((_MARGIN, top + side // 2), label, fill=_INK, font=font, anchor="lm")
        for column, image in enumerate(images[:columns]):
            _framed(canvas, _enlarged(image, side), (text_width + column * step, top))
    return canvas


def patch_picture(
    images: PixelBatch,
    starts: Bool[NDArray[np.bool_], "B T"],
    entropies: Float32[NDArray[np.float32], "B T"] | None,
    grid: int,
) -> Image.Image:
    """One row per image: the image, its outlined patches, and a heat map of its entropies if they are given.

    Args:
        images: Images.
        starts: True where a patch starts; tokens in raster order.
        entropies: Nats. The first token of an image has no prediction and is drawn grey.
        grid: Tokens along one side.
    """
    token = max(_TOKEN_PIXELS, -(-images.shape[1] // grid))
    side = token * grid
    font_size = max(15, side // 14)
    font, head = ImageFont.load_default(size=font_size), font_size + 2 * _MARGIN
    step, row_step = side + 2 * _MARGIN, side + _CAPTION + 2 * _MARGIN
    titles = ("image", "patches") if entropies is None else ("image", "patches", "entropy, nats")
    bar = 0 if entropies is None else side // 3
    canvas = Image.new("RGB", (len(titles) * step + bar + _MARGIN, head + len(images) * row_step), _BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        pen.text((_MARGIN + column * step + side // 2, head // 2), title, fill=_INK, font=font, anchor="mm")
    for row, (image, start) in enumerate(zip(images, starts, strict=True)):
        top = head + row * row_step
        large = _enlarged(image, side)
        _framed(canvas, large, (_MARGIN, top))
        outlined = _faded(large)
        _outline(outlined, start, grid, token)
        canvas.paste(outlined, (_MARGIN + step, top))
        text = f"{int(start.sum())} patches, mean length {grid * grid / start.sum():.2f}"
        _caption(canvas, (_MARGIN + step, top + side), text, side)
    if entropies is not None:
        low, high = float(entropies[:, 1:].min()), float(entropies[:, 1:].max())
        for row, entropy in enumerate(entropies):
            heat = _heat_map(entropy, grid, low, high).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(heat, (_MARGIN + 2 * step, head + row * row_step))
        _colour_bar(canvas, (_MARGIN + 3 * step, head), (bar, side), low, high)
    return canvas


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture atomically."""
    write_atomic(path, lambda file: picture.save(file, "PNG"))


def captioned_grid(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """Pictures of one size in a grid with `columns` columns, each with a line of text below."""
    width, height = pictures[0].size
    step, row_step = width + _MARGIN, height + _CAPTION + 2 * _MARGIN
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * step + _MARGIN, rows * row_step + _MARGIN), _BACKGROUND)
    for place, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = _MARGIN + place % columns * step, _MARGIN + place // columns * row_step
        _framed(canvas, picture, (left, top))
        _caption(canvas, (left, top + height + 1), caption, width)
    return canvas


def enlarged(image: Pixels) -> Image.Image:
    """An image enlarged by a whole factor to a visible size, without smoothing."""
    return _enlarged(image, image.shape[0] * -(-_VISIBLE // image.shape[0]))


def patches_outlined(image: Pixels, starts: Bool[NDArray[np.bool_], " T"], grid: int) -> Image.Image:
    """An enlarged image of `grid` x `grid` tokens with its patches outlined. `starts` is true where a patch starts."""
    large = enlarged(image)
    outlined = _faded(large)
    _outline(outlined, starts, grid, large.width / grid)
    return outlined


def _framed(canvas: Image.Image, picture: Image.Image, place: tuple[int, int]) -> None:
    """Paste a picture with a thin frame, because its edges may be as white as the page."""
    canvas.paste(picture, place)
    left, top = place
    ImageDraw.Draw(canvas).rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=_FRAME)


def _enlarged(image: Pixels, side: int) -> Image.Image:
    """Enlarge without smoothing, which would hide the tokenizer's artefacts."""
    return Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)


def _faded(image: Image.Image) -> Image.Image:
    """Blend with white, so that outlines are visible."""
    return Image.blend(image, Image.new("RGB", image.size, _BACKGROUND), 0.35)


def _outline(picture: Image.Image, starts: Bool[NDArray[np.bool_], " T"], grid: int, token: float) -> None:
    """Draw a line between neighbouring tokens of different patches, and a frame around the picture."""
    pen = ImageDraw.Draw(picture)
    width = max(2, int(token) // 10)
    patch = np.cumsum(starts).reshape(grid, grid)
    for y, x in np.argwhere(patch[:, 1:] != patch[:, :-1]):
        pen.line([((x + 1) * token, y * token), ((x + 1) * token, (y + 1) * token)], fill=_OUTLINE, width=width)
    for y, x in np.argwhere(patch[1:] != patch[:-1]):
        pen.line([(x * token, (y + 1) * token), ((x + 1) * token, (y + 1) * token)], fill=_OUTLINE, width=width)
    pen.rectangle((0, 0, picture.width - 1, picture.height - 1), outline=_OUTLINE, width=width)


def _heat_map(entropy: Float32[NDArray[np.float32], " T"], grid: int, low: float, high: float) -> Image.Image:
    colours = _colours((entropy - low) / max(high - low, 1e-9))
    colours[0] = 200  # the first token has no prediction
    return Image.fromarray(colours.reshape(grid, grid, 3))


def _colour_bar(canvas: Image.Image, place: tuple[int, int], size: tuple[int, int], low: float, high: float) -> None:
    """Draw the scale of the entropies, high at the top, with one to three decimals depending on its range."""
    width, height = size
    ramp = _colours(np.linspace(1, 0, height))[:, None].repeat(width // 3, axis=1)
    canvas.paste(Image.fromarray(ramp), place)
    font_size = max(13, height // 16)
    font = ImageFont.load_default(size=font_size)
    pen = ImageDraw.Draw(canvas)
    decimals = min(3, max(1, 1 - math.floor(math.log10(max(high - low, 1e-9)))))
    for share in (0.0, 0.5, 1.0):
        y = place[1] + font_size // 2 + int((1 - share) * (height - font_size))
        label = f"{low + share * (high - low):.{decimals}f}"
        pen.text((place[0] + width // 3 + _MARGIN, y), label, fill=_INK, font=font, anchor="lm")


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, its end cut off if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _caption(canvas: Image.Image, place: tuple[int, int], text: str, width: int) -> None:
    """Write a line of text, in smaller letters if it is wider than `width` pixels."""
    text, size = shown(text), _CAPTION
    while size > 7 and ImageFont.load_default(size=size).getlength(text) > width:
        size -= 1
    font = ImageFont.load_default(size=size)
    ImageDraw.Draw(canvas).text(place, _shortened(text, font, width), fill=_INK, font=font)


def _colours(values: Float[NDArray[np.floating], "*shape"]) -> UInt8[NDArray[np.uint8], "*shape 3"]:
    """RGB colours of values in [0, 1]."""
    knots = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(np.clip(values, 0, 1), knots, _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
