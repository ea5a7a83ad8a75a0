"""Progressive JPEGs are read with as many scans as programs write, and refused with thousands."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from stages.images.decode import DecodeError, decode
from stages.images.scans import num_scans


def jpeg(**options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize(("options", "scans"), [({}, 1), ({"progressive": True}, 10)])
def test_scans_are_counted_up_to_the_end_of_the_image(options: dict[str, bool], scans: int) -> None:
    data = jpeg(**options)
    thumbnail = b"\xff\xe1" + (2 + len(data)).to_bytes(2, "big") + data
    assert num_scans(data) == scans
    assert num_scans(data[:2] + thumbnail + data[2:]) == scans, "a thumbnail in a segment does not count"
    assert num_scans(data + b"\xff\xda\0\0" * 500) == scans, "what follows the end does not count"
    for cut in (0, 1, 3, 300):
        num_scans(data[:cut])


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded() -> None:
    data = jpeg(progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * 2000 + data[-2:]
    with pytest.raises(DecodeError, match="2009 scans, expected at most 100"):
        decode(bomb)
    assert decode(data).size == (64, 64)
