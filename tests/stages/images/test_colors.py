"""Values of 16 bits: where white is, by what the file states, and what is refused as ambiguous."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from stages.images import colors
from stages.images.decode import DecodeError, decode

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: NDArray[np.uint16], color_type: int = 0, bits: int | None = None) -> bytes:
    """A PNG of 16-bit values, with an sBIT chunk if `bits` are given."""
    height, width = values.shape[:2]
    channels = values.size // (height * width)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))]
    parts += [] if bits is None else [chunk(b"sBIT", bytes([bits] * channels))]
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def grey(values: NDArray[np.uint16], bits: int | None = None) -> NDArray[np.uint8]:
    return np.asarray(decode(png(values, bits=bits)))[..., 0]


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 15, 16])
def test_grey_of_fewer_bits_is_scaled_by_those_that_the_file_states(bits: int) -> None:
    values = (RAMP * (2**bits - 1)).astype(np.uint16)
    assert np.array_equal(
        grey(values, bits), (RAMP * (2**bits - 1)).astype(np.uint16).astype(int) * 255 // (2**bits - 1)
    )


def test_grey_that_was_scaled_to_16_bits_as_the_format_asks_is_not_scaled_again() -> None:
    values = (RAMP * 4095).astype(np.uint16)
    assert np.array_equal(grey((values << 4) | (values >> 8), 12), grey(values, 12))


@pytest.mark.parametrize("brightest", [1, 255, 1023, 4095, 2**14 - 1])
def test_dark_grey_without_a_statement_is_ambiguous(brightest: int) -> None:
    with pytest.raises(DecodeError, match=f"ambiguous: the brightest of its 16-bit values is {brightest}, "):
        grey((RAMP * brightest).astype(np.uint16))
    assert grey((RAMP * brightest).astype(np.uint16), 16).max() == brightest // 257


def test_bright_grey_and_black_are_not_ambiguous() -> None:
    values = (RAMP * 2**14).astype(np.uint16)
    assert np.array_equal(grey(values), values // 257)
    assert grey(np.zeros((8, 8), np.uint16)).max() == 0


def test_a_pgm_states_its_white_in_the_header() -> None:
    values = (RAMP * 4095).astype(">u2")
    pixels = np.asarray(decode(b"P5 8 8 4095\n" + values.tobytes()))[..., 0]
    assert np.abs(pixels.astype(int) - RAMP * 255).max() <= 1
    dark = np.asarray(decode(b"P5 8 8 65535\n" + values.tobytes()))[..., 0]
    assert dark.max() == 15


def test_a_tiff_of_12_bits_states_them() -> None:
    even, odd = (np.arange(64) * 65).reshape(-1, 2).T  # two values in three bytes
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=1).astype(np.uint8).tobytes()
    tags = {256: (4, 8), 257: (4, 8), 258: (3, 12), 259: (3, 1), 262: (3, 1), 273: (4, 0), 277: (3, 1), 278: (4, 8)}
    tags[279] = (4, len(packed))
    tags[273] = (4, 8 + 2 + 12 * len(tags) + 4)
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<H2x" if kind == 3 else "<I", value)
        for tag, (kind, value) in sorted(tags.items())
    )
    data = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4) + packed
    assert np.array_equal(np.asarray(decode(data))[..., 0].ravel(), np.arange(64) * 65 * 255 // 4095)


def test_color_of_16_bits_keeps_its_upper_8_and_dim_color_is_ambiguous() -> None:
    values = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)
    wide = (values * 65535).astype(np.uint16)
    assert np.array_equal(np.asarray(decode(png(wide, color_type=2))), wide >> 8)
    dim = (values * 4095).astype(np.uint16)
    for bits in (None, 12):
        with pytest.raises(DecodeError, match="ambiguous: all of its 16-bit values are below 16384"):
            decode(png(dim, color_type=2, bits=bits))
    assert np.array_equal(np.asarray(decode(png(dim, color_type=2, bits=16))), dim >> 8)


def test_opacity_does_not_count_as_color() -> None:
    dim = np.full((8, 8, 4), 4095, np.uint16)
    dim[..., 3] = 65535
    with pytest.raises(DecodeError, match="ambiguous"):
        decode(png(dim, color_type=6))
    dim[0, 0, 1] = 65535
    assert np.asarray(decode(png(dim, color_type=6)))[0, 0].tolist() == [15, 255, 15]
    dim[..., 3] = 0
    assert np.asarray(decode(png(dim, color_type=6))).min() == 255


@pytest.mark.parametrize("cut", [8, 20, 30, 35, 40, 45])
def test_a_cut_header_is_refused(cut: int) -> None:
    with pytest.raises(DecodeError):
        decode(png((RAMP * 4095).astype(np.uint16), bits=12)[:cut])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1", "I;16", "PA"])
@pytest.mark.parametrize("rows", [1, 5])
def test_an_image_in_strips_has_the_bytes_of_the_whole(mode: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (23, 31, 4), np.uint8)).convert(
        "RGB" if mode == "CMYK" else "RGBA"
    )
    file, kind = io.BytesIO(), "TIFF" if mode in ("CMYK", "PA") else "PNG"
    if mode == "I;16":
        image = Image.fromarray(generator.integers(0, 65536, (23, 31), np.uint16))
    elif mode != "PA":
        image = image.convert(mode)
    image.save(file, kind, **({"transparency": 3} if mode in ("P", "L", "1") else {}))
    whole = np.asarray(decode(file.getvalue()))
    monkeypatch.setattr(colors, "_STRIP_PIXELS", 31 * rows)
    assert np.array_equal(np.asarray(decode(file.getvalue())), whole)
