"""Images as arrays: decoding whatever a data set holds to RGB, the crops that are tokenised, pixels to floats and back.

Source: crops of ADM (arXiv 2105.05233) and views of LlamaGen (arXiv 2406.06525), which DPAR's tokens are made from.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, UnidentifiedImageError
from PIL.Image import Resampling, Transpose

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Pixels = NDArray[np.uint8]
Views = Literal["center", "flip", "ten_crop", "ten_crop_x2"]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # PIL would also start Ghostscript for an EPS
CROP_RANGES: dict[Views, tuple[float, ...]] = {"ten_crop": (1.1,), "ten_crop_x2": (1.1, 1.05)}
FIVE_CROPS = ("top_left", "top_right", "bottom_left", "bottom_right", "center")
MAX_RESIZE = 1.25  # of the shorter side in training crops: a crop sees at least 0.8 of it
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
    """The bytes are not a whole image. The message is a reason without path or address, the same on every machine."""


def decode(data: bytes) -> Image.Image:
    """The image that a file holds, upright, in mode RGB; transparency is composited over white.

    Of an animation the first frame is taken. 16-bit grey is scaled to 8 bits. Inks become colours as (1 - C)(1 - K),
    color profiles are not applied. ADM's and LlamaGen's pipelines do not turn images upright: the few of ImageNet that
    have an EXIF orientation differ from theirs.

    Raises:
        DecodeError: Not an image of a known format, damaged, or cut short.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return _upright(_to_rgb(image), _orientation(image))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # its message holds the address of the buffer
        raise DecodeError("not an image of a known format" if data else "empty file") from error
    except Exception as error:  # on damaged bytes PIL's decoders raise almost anything
        reason = " ".join(str(error).split()) or "damaged"
        raise DecodeError(f"{type(error).__name__}: {reason}") from error


def center_crop(image: Image.Image, size: int) -> Pixels:
    """The middle square of an image, resized: (size, size, 3).

    Source: ADM's center crop: box filter by halves while twice too large, then bicubic to the size.
    """
    pixels = np.asarray(_resize_shorter_side(image, size))
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def random_crop(image: Image.Image, size: int, generator: np.random.Generator) -> Pixels:
    """A random square of a randomly resized image, mirrored or not: (size, size, 3). Training of the tokenizer.

    Source: LlamaGen's tokenizer augmentation: the shorter side becomes size to size / 0.8 pixels.
    """
    resized = _resize_shorter_side(image, int(generator.integers(size, math.ceil(size * MAX_RESIZE), endpoint=True)))
    pixels = np.asarray(resized)
    top, left = (int(generator.integers(side - size, endpoint=True)) for side in pixels.shape[:2])
    crop = pixels[top : top + size, left : left + size]
    return crop[:, ::-1] if generator.random() < 0.5 else crop


def views(image: Image.Image, size: int, kind: Views) -> list[Pixels]:
    """The views of an image that are tokenised, each (size, size, 3), in the order of `view_names`.

    Source: LlamaGen's code extraction: a center crop of range * size pixels, then torchvision's ten crops.
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
    """What each view is, e.g. `1.1/mirrored/top_left`: crop range, whether mirrored first, place of the crop."""
    if kind not in CROP_RANGES:
        return ["center"] if kind == "center" else ["center", "mirrored/center"]
    return [
        f"{crop_range}/{mirrored}{place}"
        for crop_range in CROP_RANGES[kind]
        for mirrored in ("", "mirrored/")
        for place in FIVE_CROPS
    ]


def pixels_to_float(pixels: Pixels, device: torch.device | str = "cpu") -> Tensor:
    """Images (B, H, W, 3) uint8 as a tensor (B, 3, H, W) on a device, float32 in [-1, 1].

    Bytes travel and become floats there: a quarter of the transfer, and no work for a CPU that has images to decode.
    """
    import torch  # takes seconds, and the dataset stage needs none of it

    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def float_to_pixels(images: Tensor) -> Pixels:
    """Images (B, 3, H, W) in [-1, 1], on any device, as (B, H, W, 3) uint8. Undoes `pixels_to_float` exactly.

    Source: ADM and LlamaGen sampling: clamp(127.5 x + 128, 0, 255), cut to an integer.
    """
    pixels = images.float().mul(127.5).add_(128.0).clamp_(0.0, 255.0).byte()
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Adobe's programs store inks inverted and say so; PIL undoes that in every JPEG, marked or not.
        return ImageChops.invert(image).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide_grey(image)
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        white = Image.new("RGBA", pixels.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, pixels).convert("RGB")
    return image.convert("RGB")


def _from_wide_grey(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey: PIL's own conversion clips it at 255, which turns nearly all of it white."""
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} have no known white")
    return Image.fromarray((grey.astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) when there is none; damaged EXIF is no reason to lose the picture."""
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


def _five_crops(pixels: Pixels, size: int) -> list[Pixels]:
    """Corners and center of a square, in the order of FIVE_CROPS."""
    last = pixels.shape[0] - size
    middle = round(last / 2)  # to even, as torchvision does
    corners = [(0, 0), (0, last), (last, 0), (last, last), (middle, middle)]
    return [pixels[top : top + size, left : left + size] for top, left in corners]
