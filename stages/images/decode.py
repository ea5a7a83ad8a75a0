"""Images as arrays: decoding of image files to RGB, and the crops that are tokenised.

Source: crops of ADM (arXiv 2105.05233) and views of LlamaGen (arXiv 2406.06525), as used for DPAR's tokens.
"""

from __future__ import annotations

import io
import math
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageChops, UnidentifiedImageError
from PIL.Image import Resampling, Transpose

from stages.runtime.arrays import Pixels

Square = UInt8[NDArray[np.uint8], "{size} {size} 3"]
"""One RGB image whose side is the argument `size` of the function."""
Views = Literal["center", "flip", "ten_crop", "ten_crop_x2"]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # PIL would also start Ghostscript for an EPS
CROP_RANGES: dict[Views, tuple[float, ...]] = {"ten_crop": (1.1,), "ten_crop_x2": (1.1, 1.05)}
FIVE_CROPS = ("top_left", "top_right", "bottom_left", "bottom_right", "center")
MAX_RESIZE = 1.25  # largest shorter side of a resized training image, in units of the crop's side
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class DecodeError(ValueError):
    """The bytes are not a whole image. The message holds no path or address: it is the same on every machine."""


def decode(data: bytes) -> Image.Image:
    """Decode an image file to an upright image in mode RGB.

    Transparency is composited over white. An animation gives its first frame. 16-bit grey is scaled to 8 bits. CMYK
    inks become colours as (1 - C)(1 - K). Color profiles are not applied. ADM's and LlamaGen's pipelines ignore the
    EXIF orientation, so the few images of ImageNet that have one differ from theirs.

    Raises:
        DecodeError: The file is not an image of a known format, or is damaged or truncated.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return _upright(_to_rgb(image), _orientation(image))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # its own message contains the address of the buffer
        raise DecodeError("not an image of a known format" if data else "empty file") from error
    except Exception as error:  # on damaged bytes PIL's decoders raise almost anything
        reason = " ".join(str(error).split()) or "damaged"
        raise DecodeError(f"{type(error).__name__}: {reason}") from error


def center_crop(image: Image.Image, size: int) -> Square:
    """Center square of an image, resized to `size` pixels.

    Source: ADM's center crop: box filter by halves while at least twice too large, then bicubic to the size.
    """
    pixels = np.asarray(_resize_shorter_side(image, size))
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def random_crop(image: Image.Image, size: int, generator: np.random.Generator) -> Square:
    """Random square crop of a randomly resized image, mirrored with probability 0.5. For training the tokenizer.

    Source: LlamaGen's tokenizer augmentation: the shorter side is resized to between size and size / 0.8 pixels.
    """
    resized = _resize_shorter_side(image, int(generator.integers(size, math.ceil(size * MAX_RESIZE), endpoint=True)))
    pixels = np.asarray(resized)
    top, left = (int(generator.integers(side - size, endpoint=True)) for side in pixels.shape[:2])
    crop = pixels[top : top + size, left : left + size]
    return crop[:, ::-1] if generator.random() < 0.5 else crop


def views(image: Image.Image, size: int, kind: Views) -> list[Square]:
    """Views of an image that are tokenised, in the order of `view_names`.

    Source: LlamaGen's code extraction: a center crop of crop_range * size pixels, then torchvision's ten crops.
    """
    if kind not in CROP_RANGES:
        center = center_crop(image, size)
        return [center] if kind == "center" else [center, center[:, ::-1]]
    crops = []
    for crop_range in CROP_RANGES[kind]:
        square = center_crop(image, int(size * crop_range))
        crops += _five_crops(square, size) + _five_crops(square[:, ::-1], size)
    return crops


def view_names(kind: Views) -> list[str]:
    """Names of the views, e.g. `1.1/mirrored/top_left`: crop range, mirrored before cropping or not, crop position."""
    if kind not in CROP_RANGES:
        return ["center"] if kind == "center" else ["center", "mirrored/center"]
    return [
        f"{crop_range}/{mirrored}{place}"
        for crop_range in CROP_RANGES[kind]
        for mirrored in ("", "mirrored/")
        for place in FIVE_CROPS
    ]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Adobe's programs store inverted inks and mark the file. PIL inverts every CMYK JPEG, marked or not.
        return ImageChops.invert(image).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide_grey(image)
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        white = Image.new("RGBA", pixels.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, pixels).convert("RGB")
    return image.convert("RGB")


def _from_wide_grey(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits. PIL's own conversion clips at 255, which turns most pixels white."""
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} have no known white")
    return Image.fromarray((grey.astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 (upright) if it is missing or damaged, because the image itself may be whole."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OSError, ArithmeticError):
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _ORIENTATIONS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _resize_shorter_side(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)


def _five_crops(pixels: Pixels, size: int) -> list[Square]:
    """Corner crops and center crop of a square, in the order of FIVE_CROPS."""
    last = pixels.shape[0] - size
    middle = round(last / 2)  # half to even, as in torchvision
    corners = [(0, 0), (0, last), (last, 0), (last, last), (middle, middle)]
    return [pixels[top : top + size, left : left + size] for top, left in corners]
