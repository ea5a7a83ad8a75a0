import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.transforms import functional as torchvision

from stages.images import (
    DecodeError,
    center_crop,
    decode,
    float_to_pixels,
    pixels_to_float,
    random_crop,
    view_names,
    views,
)

RED, BLUE = (200, 30, 10), (20, 40, 220)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(image: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
    result = decode(encoded(image, kind, **options))
    assert result.mode == "RGB"
    return np.asarray(result)


def half_and_half(mode: str, left: object, right: object) -> Image.Image:
    image = Image.new(mode, (8, 4), left)
    image.paste(right, (4, 0, 8, 4))
    return image


def assert_halves(pixels: np.ndarray, left: object, right: object, *, tolerance: int = 0) -> None:
    assert np.abs(pixels[:, :4].astype(int) - left).max() <= tolerance
    assert np.abs(pixels[:, 4:].astype(int) - right).max() <= tolerance


def test_transparency_is_composited_over_white() -> None:
    assert_halves(decoded(half_and_half("RGBA", (*RED, 255), (*BLUE, 0))), RED, 255)
    half = [round((channel + 255) / 2) for channel in BLUE]
    assert_halves(decoded(half_and_half("RGBA", (*RED, 255), (*BLUE, 128))), RED, half, tolerance=1)
    assert_halves(decoded(half_and_half("LA", (90, 255), (0, 0))), 90, 255)


def test_a_palette_with_a_transparent_colour_is_composited_over_white() -> None:
    image = Image.new("P", (8, 4), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (4, 0, 8, 4))
    assert_halves(decoded(image, transparency=1), RED, 255)
    assert_halves(decoded(image, "GIF", transparency=1), RED, 255)
    assert_halves(decoded(image), RED, BLUE)


def test_a_transparent_colour_of_rgb_and_grey_is_composited_over_white() -> None:
    assert_halves(decoded(half_and_half("RGB", RED, BLUE), transparency=BLUE), RED, 255)
    assert_halves(decoded(half_and_half("L", 90, 7), transparency=7), 90, 255)


def test_other_modes_become_rgb() -> None:
    assert_halves(decoded(half_and_half("L", 90, 7)), 90, 7)
    assert_halves(decoded(half_and_half("1", 1, 0)), 255, 0)
    cmyk = half_and_half("RGB", RED, BLUE).convert("CMYK")
    assert_halves(decoded(cmyk, "JPEG", quality=100, subsampling=0), RED, BLUE, tolerance=12)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    grey = np.full((4, 8), 90 * 257, np.uint16)
    grey[:, 4:] = 65535
    assert_halves(decoded(Image.fromarray(grey)), 90, 255)
    assert_halves(decoded(Image.fromarray(grey), "TIFF"), 90, 255)


def test_floats_without_a_known_white_are_refused() -> None:
    with pytest.raises(DecodeError, match="no known white"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    upright = noise(8, 4)
    turns: dict[int, Callable[[Image.Image], Image.Image]] = {  # what a camera held that way records
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(turns[orientation](upright), exif=exif), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_lose_the_picture() -> None:
    image = noise(8, 4)
    assert np.array_equal(decoded(image, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f"), image)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused(kind: str, kept: float) -> None:
    data = encoded(noise(64, 64), kind)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    with pytest.raises(DecodeError):
        decode(data[: int(len(data) * kept)])


def test_reasons_name_what_is_wrong_and_nothing_of_this_machine() -> None:
    for data, reason in ((b"", "empty file"), (b"not an image at all", "not an image of a known format")):
        with pytest.raises(DecodeError, match=f"^{reason}$"):
            decode(data)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
    with pytest.raises(DecodeError, match="not an image of a known format"):
        decode(postscript)


def test_center_crop_is_adms() -> None:
    image = noise(150, 70)
    half = image.resize((75, 35), Image.Resampling.BOX)  # 70 >= 2 * 32, 35 < 2 * 32
    scaled = half.resize((round(75 * 32 / 35), 32), Image.Resampling.BICUBIC)
    left = (scaled.width - 32) // 2
    assert np.array_equal(center_crop(image, 32), np.asarray(scaled)[:, left : left + 32])


@pytest.mark.parametrize("shape", [(16, 16), (31, 7), (1, 90), (200, 33)])
def test_center_crop_has_its_size_whatever_the_image(shape: tuple[int, int]) -> None:
    assert center_crop(noise(*shape), 16).shape == (16, 16, 3)


@pytest.mark.parametrize("size", [32, 40])
def test_ten_crops_are_torchvisions_of_a_wider_center_crop(size: int) -> None:
    image = noise(90, 70)
    found = views(image, size, "ten_crop_x2")
    wanted = [
        np.asarray(crop)
        for crop_range in (1.1, 1.05)
        for crop in torchvision.ten_crop(Image.fromarray(center_crop(image, int(size * crop_range))), size)
    ]
    assert len(found) == 20
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(views(image, size, "ten_crop"), wanted[:10], strict=True))


def test_flip_is_the_center_and_its_mirror_image() -> None:
    image = noise(50, 40)
    center, mirrored = views(image, 32, "flip")
    assert np.array_equal(center, center_crop(image, 32))
    assert np.array_equal(mirrored, center[:, ::-1])
    assert np.array_equal(views(image, 32, "center"), [center])


@pytest.mark.parametrize(("kind", "count"), [("center", 1), ("flip", 2), ("ten_crop", 10), ("ten_crop_x2", 20)])
def test_every_view_has_a_name_of_its_own(kind: str, count: int) -> None:
    assert len(set(view_names(kind))) == len(views(noise(40, 40), 16, kind)) == count


def test_random_crops_depend_on_the_generator_alone() -> None:
    image = noise(60, 50)
    crops = [random_crop(image, 32, np.random.default_rng(seed)) for seed in range(12)]
    again = [random_crop(image, 32, np.random.default_rng(seed)) for seed in range(12)]
    assert all(crop.shape == (32, 32, 3) for crop in crops)
    assert np.array_equal(crops, again)
    assert len({crop.tobytes() for crop in crops}) > 10


class Recorded:
    """A generator whose draws are known: of every range first the lowest, then the highest number."""

    def __init__(self, draws: list[int]) -> None:
        self.draws, self.ranges = draws, list[tuple[int, int]]()

    def integers(self, low: int, high: int | None = None, *, endpoint: bool) -> int:
        low, high = (0, low) if high is None else (low, high)
        assert endpoint
        self.ranges.append((low, high))
        return min(self.draws.pop(0), high)

    def random(self) -> float:
        return 0.9


@pytest.mark.parametrize("size", [16, 33, 64, 250, 256, 384])
def test_the_shorter_side_of_training_crops_is_as_published(size: int) -> None:
    source, side = noise(500, 400), math.ceil(size / 0.8)
    recorded = Recorded([side, 3, 5])
    crop = random_crop(source, size, recorded)  # type: ignore[arg-type]
    assert recorded.ranges[0] == (math.ceil(size / 1.0), side)
    resized = source
    while min(resized.size) >= 2 * side:
        resized = resized.resize((resized.width // 2, resized.height // 2), Image.Resampling.BOX)
    scale = side / min(resized.size)
    resized = resized.resize((round(resized.width * scale), round(resized.height * scale)), Image.Resampling.BICUBIC)
    top, left = min(3, resized.height - size), min(5, resized.width - size)
    assert recorded.ranges[1:] == [(0, resized.height - size), (0, resized.width - size)]
    assert np.array_equal(crop, np.asarray(resized)[top : top + size, left : left + size])


def test_random_crops_show_at_least_four_fifths_of_the_shorter_side() -> None:
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[:] = (np.arange(64) * 4)[:, None, None]
    spans = []
    for seed in range(40):
        crop = random_crop(Image.fromarray(ramp), 32, np.random.default_rng(seed)).astype(int)
        spans.append((crop[-1, 0, 0] - crop[0, 0, 0]) / 256)
    assert min(spans) > 0.75
    assert max(spans) > 0.95


def test_pixels_survive_the_way_to_floats_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    floats = pixels_to_float(pixels)
    assert floats.shape == (1, 3, 16, 16)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1.0, 1.0)
    assert np.array_equal(float_to_pixels(floats), pixels)


def test_floats_beyond_the_range_are_clamped_and_the_rest_cut() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 0.0039, 3.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert float_to_pixels(values)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255]
