"""First bytes tell what a file holds: PIL's own files of every format, and files that are no images."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile

import numpy as np
import pytest
from PIL import Image

from stages.images.contents import FORMATS, HEAD_BYTES, is_image_head, kind_of_head, unread_format


def saved(kind: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)).convert(mode).save(
        file, kind, **options
    )
    return file.getvalue()[:HEAD_BYTES]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_every_format_that_is_read_is_known_by_its_first_bytes(kind: str, mode: str) -> None:
    head = saved(kind, "L" if kind == "JPEG" and mode == "1" else mode)
    assert is_image_head(head)
    assert unread_format(head) is None


def test_a_big_tiff_is_known() -> None:
    assert is_image_head(saved("TIFF", big_tiff=True))


@pytest.mark.parametrize(
    ("kind", "form"), [("JPEG2000", "JPEG 2000"), ("ICO", "icon"), ("EPS", "PostScript"), ("DDS", "DDS")]
)
def test_images_that_are_not_read_are_named(kind: str, form: str) -> None:
    head = saved(kind)
    assert is_image_head(head)
    assert unread_format(head) == form


@pytest.mark.parametrize(
    ("head", "form"),
    [
        (b"\0\0\0\x20ftypavif\0\0\0\0", "HEIF or AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIF or AVIF"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">', "SVG"),
        (b"<svg>", "SVG"),
        (b"\xff\x0a\xff\xff", "JPEG XL"),
        (b"8BPS\0\1", "Photoshop"),
    ],
)
def test_other_image_formats_are_named(head: bytes, form: str) -> None:
    assert unread_format(head) == form


def test_what_is_no_image_is_told_in_words() -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a", "b")
    kinds = {
        b"": "an empty file",
        b"BMW and Audi are makers of cars": "text",
        b"P5 is a name": "text",
        b"GIF is a format": "text",
        b"<!DOCTYPE html><title>404</title>": "text",
        ("Ä" * 40).encode()[:HEAD_BYTES]: "text",
        ("x" + "Ä" * 40).encode()[:HEAD_BYTES]: "text",
        bytes(64): "unknown contents",
        b"\0\0\0\x18ftypmp42\0\0": "a video",
        b"RIFF\0\0\0\0AVI LIST": "a video",
        packed.getvalue(): "an archive",
        gzip.compress(b"x"): "an archive",
        bz2.compress(b"x"): "an archive",
        lzma.compress(b"x"): "an archive",
        b"%PDF-1.7": "a PDF",
    }
    for head, kind in kinds.items():
        assert not is_image_head(head), head
        assert kind_of_head(head) == kind, head
