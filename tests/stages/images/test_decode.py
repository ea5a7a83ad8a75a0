import io
import math
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers
from PIL import Image, ImageFile
from torchvision.transforms import functional as torchvision

from stages.images import decode as images
from stages.images.decode import DecodeError, center_crop, decode, random_crop, view_names, views
from stages.images.tensors import float_to_pixels, pixels_to_float

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
    assert_halves(decoded(half_and_half("L", 90, 7), "JPEG", quality=100), 90, 7, tolerance=1)


INKS = (10, 200, 30, 40), (130, 20, 220, 100)


def jpeg_of_inks(left: tuple[int, ...], right: tuple[int, ...]) -> bytes:
    """A CMYK JPEG as Adobe's programs write it: inks inverted, an APP14 marker with transform 0."""
    image = Image.new("CMYK", (32, 16), left)
    image.paste(right, (16, 0, 32, 16))
    return encoded(image, "JPEG", quality=100, subsampling=0)


def color_of(inks: tuple[int, ...]) -> list[float]:
    return [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]]


def assert_colors(data: bytes, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    pixels = np.asarray(decode(data)).astype(float)
    assert np.abs(pixels[:, :16] - color_of(left)).max() <= 2
    assert np.abs(pixels[:, 16:] - color_of(right)).max() <= 2


def test_inverted_inks_of_adobe_become_colors() -> None:
    assert_colors(jpeg_of_inks(*INKS), *INKS)


def test_inks_without_adobes_marker_are_not_inverted() -> None:
    inverted = [tuple(255 - ink for ink in inks) for inks in INKS]
    data = jpeg_of_inks(*inverted)
    marker = data.index(b"\xff\xee")
    length = 2 + int.from_bytes(data[marker + 2 : marker + 4], "big")
    assert_colors(data[:marker] + data[marker + length :], *INKS)


def test_inks_as_luminance_and_chroma_become_colors() -> None:
    def ycck(inks: tuple[int, ...]) -> tuple[int, ...]:
        """JFIF's luminance and chroma of cyan, magenta and yellow; inverted, for it is a writer of inverted inks."""
        c, m, y = inks[:3]
        luma = 0.299 * c + 0.587 * m + 0.114 * y
        stored = (luma, 128 + (y - luma) / 1.772, 128 + (c - luma) / 1.402)
        return (*(255 - round(value) for value in stored), inks[3])

    data = bytearray(jpeg_of_inks(*(ycck(inks) for inks in INKS)))
    data[data.index(b"Adobe") + 11] = 2  # the transform: YCCK
    assert_colors(bytes(data), *INKS)


def test_a_palette_with_half_transparent_colors_is_composited_over_white() -> None:
    image = Image.new("P", (8, 4), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (4, 0, 8, 4))
    half = [round((channel + 255) / 2) for channel in BLUE]
    assert_halves(decoded(image, transparency=bytes([255, 128])), RED, half, tolerance=1)


def test_a_phones_photograph_comes_out_upright() -> None:
    upright = half_and_half("RGB", RED, BLUE).resize((64, 32), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise
    pixels = decoded(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=100, subsampling=0, exif=exif)
    assert pixels.shape == (32, 64, 3)
    assert np.abs(pixels.astype(int) - np.asarray(upright)).max() <= 3


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


def plain_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's rule, written down once more."""
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    left, top = (width - size) // 2, (height - size) // 2
    return pixels[top : top + size, left : left + size]


def plain_ten_crop(image: Image.Image, size: int, wide: int) -> list[np.ndarray]:
    """Top left, top right, bottom left, bottom right, middle; the same of the mirror image."""
    square, crops = plain_center_crop(image, wide), []
    for pixels in (square, square[:, ::-1]):
        end, middle = wide - size, round((wide - size) / 2)
        for top, left in ((0, 0), (0, end), (end, 0), (end, end), (middle, middle)):
            crops.append(pixels[top : top + size, left : left + size])
    return crops


@settings(max_examples=40, deadline=None)
@given(width=integers(1, 200), height=integers(1, 200), size=integers(16, 40), seed=integers(0, 9))
def test_views_are_those_of_the_plain_rule(width: int, height: int, size: int, seed: int) -> None:
    image = noise(width, height, seed)
    center = plain_center_crop(image, size)
    wide, narrow = plain_ten_crop(image, size, int(size * 1.1)), plain_ten_crop(image, size, int(size * 1.05))
    assert np.array_equal(views(image, size, "center"), [center])
    assert np.array_equal(views(image, size, "flip"), [center, center[:, ::-1]])
    assert np.array_equal(views(image, size, "ten_crop"), wide)
    assert np.array_equal(views(image, size, "ten_crop_x2"), wide + narrow)


@pytest.mark.parametrize(("size", "ranges"), [(256, (281, 268)), (384, (422, 403)), (512, (563, 537))])
def test_crop_ranges_are_cut_to_whole_pixels(
    size: int, ranges: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        images, "center_crop", lambda image, wide: asked.append(wide) or np.zeros((wide, wide, 3), np.uint8)
    )
    views(noise(8, 8), size, "ten_crop_x2")
    assert tuple(asked) == ranges


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


class Recorded(np.random.Generator):
    """A generator whose draws are known: of every range first the lowest, then the highest number."""

    def __init__(self, draws: list[int]) -> None:
        super().__init__(np.random.PCG64(0))
        self.draws, self.ranges = draws, list[tuple[int, int]]()

    def integers(self, low: int, high: int | None = None, *, endpoint: bool) -> int:  # type: ignore[override]
        low, high = (0, low) if high is None else (low, high)
        assert endpoint
        self.ranges.append((low, high))
        return min(self.draws.pop(0), high)

    def random(self) -> float:  # type: ignore[override]
        return 0.9


@pytest.mark.parametrize("size", [16, 33, 64, 250, 256, 384])
def test_the_shorter_side_of_training_crops_is_as_published(size: int) -> None:
    source, side = noise(500, 400), math.ceil(size / 0.8)
    recorded = Recorded([side, 3, 5])
    crop = random_crop(source, size, recorded)
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


def whole_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The rule for an image of ordinary shape, applied to one of any shape."""
    resized = images._resize_shorter_side(image, size)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@settings(max_examples=60, deadline=None)
@given(shorter=integers(1, 40), ratio=integers(1, 16), more=integers(0, 1), size=integers(8, 40), tall=integers(0, 1))
def test_up_to_sixteen_times_as_long_as_wide_an_image_is_resized_whole(
    shorter: int, ratio: int, more: int, size: int, tall: int
) -> None:
    sides = (shorter, shorter * ratio + more) if tall else (shorter * ratio + more, shorter)
    image = noise(*sides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_RESIZED_PIXELS", 0)
        assert np.array_equal(center_crop(image, size), whole_center_crop(image, size))
        recorded, plain = Recorded([size + 1, 10**6, 10**6]), images._resize_shorter_side(image, size + 1)
        assert np.array_equal(random_crop(image, size, recorded), np.asarray(plain)[-size:, -size:])
        assert len(recorded.ranges) == 3


@settings(max_examples=60, deadline=None)
@given(shorter=integers(1, 60), longer=integers(200, 3000), size=integers(16, 32), tall=integers(0, 1))
def test_a_longer_image_is_cut_first_and_its_crop_is_that_of_the_whole(
    shorter: int, longer: int, size: int, tall: int
) -> None:
    """Halving an odd number of pixels drops the last: the crop may move by a part of a pixel of the result."""
    shorter = min(shorter, longer // 20)
    x, y = np.meshgrid(np.arange(longer), np.arange(shorter))
    smooth = np.stack([127 + 90 * np.sin(x / shorter / k + y / shorter + k) for k in (1, 2, 3)], axis=-1).astype(
        np.uint8
    )
    image = Image.fromarray(smooth.swapaxes(0, 1).copy() if tall else smooth)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_RESIZED_PIXELS", 0)
        difference = center_crop(image, size).astype(int) - whole_center_crop(image, size)
    assert np.abs(difference).max() <= 14
    assert np.abs(difference).mean() <= 4


@pytest.mark.parametrize("sides", [(1, 5000), (5000, 1), (3, 20_000), (2, 100_001)])
def test_memory_does_not_depend_on_the_shape(sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    original = Image.Image.resize

    def resize(self: Image.Image, wanted: tuple[int, int], *args: object) -> Image.Image:
        nonlocal largest
        largest = max(largest, wanted[0] * wanted[1])
        return original(self, wanted, *args)

    monkeypatch.setattr(Image.Image, "resize", resize)
    image = noise(*sides)
    assert center_crop(image, 256).shape == (256, 256, 3)
    assert random_crop(image, 256, np.random.default_rng(0)).shape == (256, 256, 3)
    assert len(views(image, 256, "ten_crop_x2")) == 20
    assert 2**20 < largest <= 1.1 * 2**22


def test_random_crops_of_a_long_image_come_from_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_RESIZED_PIXELS", 0)
    ramp = np.zeros((4, 2000, 3), np.uint8)
    ramp[:] = (np.arange(2000) // 8)[None, :, None]
    places = [random_crop(Image.fromarray(ramp), 16, np.random.default_rng(seed)).mean() for seed in range(60)]
    assert min(places) < 40
    assert max(places) > 210


def test_an_image_of_more_pixels_than_allowed_is_refused_before_it_is_decoded() -> None:
    data = encoded(noise(30, 20))
    assert decode(data, 600).size == (30, 20)
    with pytest.raises(DecodeError, match=r"30 x 20 pixels, expected at most 599 \(dataset\.max_pixels\)"):
        decode(data, 599)


@pytest.mark.timeout(20)
def test_an_image_of_too_many_rows_is_refused_before_it_is_decoded() -> None:
    data = bytearray(encoded(noise(1, 1)))
    data[20:24] = struct.pack(">I", 80_000_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(DecodeError, match="1 x 80000000 pixels, expected sides of at most 1048576"):
        decode(bytes(data))


def test_a_format_that_is_not_read_is_named() -> None:
    file = io.BytesIO()
    noise(8, 8).save(file, "JPEG2000")
    with pytest.raises(DecodeError, match=r"^not an image of a known format \(JPEG 2000\)$"):
        decode(file.getvalue())


def test_frames_and_pages_after_the_first_are_not_read() -> None:
    frames = [noise(16, 16, seed) for seed in range(50)]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        first = decoded(frames[0], kind, **options)
        assert np.array_equal(np.asarray(decode(data)), first), kind


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt"])
def test_a_chunk_that_unpacks_to_a_gigabyte_takes_no_memory(kind: bytes) -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(2**24)) for _ in range(8)) + packer.flush()
    data = encoded(noise(8, 8))
    chunk = b"name\0\0" + bomb
    framed = struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", zlib.crc32(kind + chunk))
    tracemalloc.start()
    try:
        decode(data[:33] + framed + data[33:])
    except DecodeError as error:
        assert "Decompressed data too large" in str(error)  # noqa: PT017 - a later Pillow may pass over the chunk
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()
