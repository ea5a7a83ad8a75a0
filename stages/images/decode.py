"""Images as arrays: decoding of image files to RGB, and the crops that are tokenised.

Source: crops of ADM (arXiv 2105.05233) and views of LlamaGen (arXiv 2406.06525), as used for DPAR's tokens.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
import threading
import warnings
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.Image import Resampling, Transpose

from stages.images.colors import to_rgb
from stages.images.contents import FORMATS, HEAD_BYTES, unread_format
from stages.images.scans import num_scans
from stages.runtime.arrays import Pixels

Square = UInt8[NDArray[np.uint8], "{size} {size} 3"]
"""One RGB image whose side is the argument `size` of the function."""
Views = Literal["center", "flip", "ten_crop", "ten_crop_x2"]

CROP_RANGES: dict[Views, tuple[float, ...]] = {"ten_crop": (1.1,), "ten_crop_x2": (1.1, 1.05)}
FIVE_CROPS = ("top_left", "top_right", "bottom_left", "bottom_right", "center")
MAX_RESIZE = 1.25  # largest shorter side of a resized training image, in units of the crop's side
MAX_RATIO = 16  # of the sides of an image that is resized whole, whatever the size
_RESIZED_PIXELS = 2**22  # of an image that is resized whole, whatever its ratio: up to 1 : 64 for a crop of 256 pixels
_LARGE = 2**24  # pixels of an image that is decoded alone: several at a time would fill the memory
PIL_PIXELS = 178_956_970  # of the largest image that PIL opens
_MAX_SIDE = 2**20  # pixels: each row has a cost of its own
_MAX_SCANS = 100  # of a progressive JPEG; programs write ten
_AT_MOST = "at most {} (dataset.max_pixels)"
_alone = threading.Lock()
warnings.filterwarnings("ignore", module=r"PIL\.")  # an image is whole, or its reason is in the list of broken ones
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


def decode(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Decode an image file to an upright image in mode RGB.

    Transparency is composited over white. An animation gives its first frame, a file of several pages its first page.
    16-bit grey is scaled to 8 bits; grey of fewer bits in such a file, by the bits that the file states. CMYK inks
    become colours as (1 - C)(1 - K). Color profiles are not applied. ADM's and LlamaGen's pipelines ignore the EXIF
    orientation, so the few images of ImageNet that have one differ from theirs.

    Args:
        data: The bytes of the file.
        max_pixels: Largest number of pixels. PIL opens at most 178,956,970.

    Raises:
        DecodeError: The file is not an image of a known format, is too large, damaged or truncated, or nothing tells
            which of its values is white.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
            if max_pixels is not None and pixels > max_pixels:
                raise DecodeError(f"{image.width} x {image.height} pixels, expected {_AT_MOST.format(max_pixels)}")
            if max(image.size) > _MAX_SIDE:
                raise DecodeError(f"{image.width} x {image.height} pixels, expected sides of at most {_MAX_SIDE}")
            if image.info.get("progressive") and (scans := num_scans(data)) > _MAX_SCANS:
                raise DecodeError(f"{scans} scans, expected at most {_MAX_SCANS}")
            with _alone if pixels > _LARGE else contextlib.nullcontext():
                image.load()
                return _upright(to_rgb(image, data), _orientation(image))
    except (MemoryError, DecodeError):
        raise
    except UnidentifiedImageError as error:  # its own message contains the address of the buffer
        form = unread_format(data[:HEAD_BYTES])
        reason = "not an image of a known format" + (f" ({form})" if form else "")
        raise DecodeError(reason if data else "empty file") from error
    except Image.DecompressionBombError as error:
        raise DecodeError(f"DecompressionBombError: too many pixels, expected {_AT_MOST.format(PIL_PIXELS)}") from error
    except Exception as error:  # on damaged bytes PIL's decoders raise almost anything
        reason = " ".join(str(error).split()) or "damaged"
        raise DecodeError(f"{type(error).__name__}: {reason}") from error


def center_crop(image: Image.Image, size: int) -> Square:
    """Center square of an image, resized to `size` pixels.

    Source: ADM's center crop: box filter by halves while at least twice too large, then bicubic to the size.
    """
    spare = _spare(image, size)
    pixels = np.asarray(_resize_shorter_side(_without(image, spare, spare // 2), size))
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def random_crop(image: Image.Image, size: int, generator: np.random.Generator) -> Square:
    """Random square crop of a randomly resized image, mirrored with probability 0.5. For training the tokenizer.

    Source: LlamaGen's tokenizer augmentation: the shorter side is resized to between size and size / 0.8 pixels.
    """
    if spare := _spare(image, math.ceil(size * MAX_RESIZE)):
        image = _without(image, spare, int(generator.integers(spare, endpoint=True)))
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


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 (upright) if it is missing or damaged, because the image itself may be whole."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OSError, ArithmeticError, struct.error):
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _ORIENTATIONS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _spare(image: Image.Image, size: int) -> int:
    """Pixels of the longer side that are cut off before the shorter one is resized to `size`; 0 for most images.

    A crop is square, so of a long image only a part can be in it. Resized whole, one of 1 x 5,000 pixels would have 300
    million. Images up to MAX_RATIO times as long as wide are resized whole, and longer ones that stay small. An even
    number keeps the center where it is.
    """
    shorter, longer = sorted(image.size)
    return max(0, longer - shorter * max(MAX_RATIO, _RESIZED_PIXELS // size**2)) // 2 * 2


def _without(image: Image.Image, spare: int, first: int) -> Image.Image:
    """The image without `spare` pixels of its longer side, of which `first` are at its start."""
    if not spare:
        return image
    if image.width > image.height:
        return image.crop((first, 0, image.width - spare + first, image.height))
    return image.crop((0, first, image.width, image.height - spare + first))


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
