"""Decoded images of any mode as RGB with 8 bits. Rules for each mode, and where white is in values of 16 bits."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops

_STRIP_PIXELS = 2**22  # converted at a time, so that a huge image is in memory once, not once for each step
_BITS_PER_SAMPLE = 258  # tag of a TIFF
_DIM = 2**14  # brightest value of 16 bits below which the values may have fewer bits
_PNG_CHANNELS = {0: 1, 2: 3, 4: 1, 6: 3}  # channels of color, by color type
Convert = Callable[[Image.Image], Image.Image]


def to_rgb(image: Image.Image, data: bytes) -> Image.Image:
    """A loaded image in mode RGB.

    Args:
        image: The image, loaded.
        data: The file it was decoded from.

    Raises:
        ValueError: Nothing tells which value is white.
    """
    convert = _conversion(image, data)
    if image.width * image.height <= _STRIP_PIXELS:
        return convert(image)
    result = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        result.paste(convert(image.crop(box)), box)
    return result


def _conversion(image: Image.Image, data: bytes) -> Convert:
    """The conversion of an image, which may be applied to strips of it."""
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Adobe's programs store inverted inks and mark the file. PIL inverts every CMYK JPEG, marked or not.
        return lambda part: ImageChops.invert(part).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        white = _white(image, data)
        return lambda part: _from_wide_grey(part, white)
    _require_bright(image, data)
    return _over_white if image.has_transparency_data else lambda part: part.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    pixels = image.convert("RGBA")
    white = Image.new("RGBA", pixels.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, pixels).convert("RGB")


def _from_wide_grey(image: Image.Image, white: int) -> Image.Image:
    """Scale grey to 8 bits. PIL's own conversion clips at 255, which turns most pixels white."""
    grey = np.asarray(image).astype(np.uint32)
    return Image.fromarray((grey * 255 // white).astype(np.uint8)).convert("RGB")


def _white(image: Image.Image, data: bytes) -> int:
    """The value of white in grey of up to 16 bits.

    Cameras and scanners store 12 bits in files of 16. The file says so, or it does not; then a picture without a value
    in the upper three quarters is either dark or has fewer bits.
    """
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} have no known white")
    brightest, bits = int(grey.max()), _stated_bits(image, data)
    if bits is not None and brightest < 2**bits:
        return int(2**bits) - 1
    if 0 < brightest < _DIM and bits is None:
        raise ValueError(
            f"ambiguous: the brightest of its 16-bit values is {brightest}, which may be dark grey or white of fewer "
            "bits; say which by an sBIT chunk, or scale the values"
        )
    return 65535


def _require_bright(image: Image.Image, data: bytes) -> None:
    """Refuse color of 16 bits whose values may have fewer: PIL keeps the upper 8 of them."""
    if not _has_wide_color(image, data) or _stated_bits(image, data) == 16:
        return
    colors = image.getextrema()[: len(image.getbands()) - image.mode.endswith("A")]
    if max(int(extrema[1]) for extrema in colors) < _DIM >> 8:  # type: ignore[index]
        raise ValueError(
            f"ambiguous: all of its 16-bit values are below {_DIM}, which may be dark color or color of fewer bits; "
            "say which by an sBIT chunk of 16, or scale the values"
        )


def _has_wide_color(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":
        return data[24:25] == b"\x10"
    tags = getattr(image, "tag_v2", {})
    return image.format == "TIFF" and 16 in tags.get(_BITS_PER_SAMPLE, ())


def _stated_bits(image: Image.Image, data: bytes) -> int | None:
    """Significant bits of each value, as far as a file of 16 bits states them."""
    if image.format == "PPM":
        return 16  # PIL has scaled the values by the largest one that the header gives
    if image.format == "TIFF":
        bits = max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,)))
        return bits if 8 < bits < 16 else None
    return _significant_bits(data) if image.format == "PNG" else None


def _significant_bits(png: bytes) -> int | None:
    """The largest number of bits in the sBIT chunk of a PNG; None without one. It lies before the pixels."""
    place = 8
    while place + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        if kind == b"sBIT":
            stated = png[place + 8 : place + 8 + min(length, _PNG_CHANNELS.get(png[25], 0))]
            return max((bits for bits in stated if 0 < bits <= 16), default=None)
        if kind == b"IDAT":
            return None
        place += 12 + length
    return None
