"""What a source holds: images, and files that are left out. Reading the bytes of an image."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

from stages.runtime.regular_file import open_if_regular

MAX_BYTES = 2**30  # of one image file: more would fill the memory before the number of pixels is known


class ImageFile(NamedTuple):
    """One image of a source, or what bears an image's name and cannot be read."""

    relpath: str
    """Path below the image root, with "/" between the parts. In a tar: class tar, "/", member name."""
    class_name: str
    offset: int = 0
    """Offset of the first byte in the tar, after a header; 0 for a separate file."""
    size: int = -1
    """Number of bytes in the tar; -1 for a separate file."""


class LeftOut(NamedTuple):
    """A file or folder of a source that is no image."""

    relpath: str
    """Path below the image root; ends with "/" for a folder, whose files are not named."""
    reason: str


def archive_path(root: Path, relpath: str) -> Path:
    """The tar that holds an image with an offset: the root itself, or one of the class tars below it."""
    return root if root.is_file() else root / relpath.split("/", 1)[0]


def read_image(root: Path, relpath: str, offset: int, size: int) -> bytes:
    """The bytes of an image, see `ImageFile`. There are fewer if the file was cut after listing.

    Raises:
        OSError: The file cannot be read, is no regular file, or is larger than MAX_BYTES.
    """
    with open_if_regular(archive_path(root, relpath) if offset else root / relpath) as file:
        length = size if offset else os.fstat(file.fileno()).st_size
        if length > MAX_BYTES:
            raise OSError(errno.EFBIG, f"{length} bytes, expected at most {MAX_BYTES}")
        file.seek(offset)
        return file.read(length)
