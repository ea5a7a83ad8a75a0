"""Tar archives read in place: the position of each member, found by reading headers only.

The standard library's `tarfile` keeps an object for each member, and takes damage after the first header for the end of
the archive. This reader keeps no members, and an archive without an end mark is an error.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from stages.runtime.errors import InputError

_BLOCK = tarfile.BLOCKSIZE
_LONG_NAME, _EXTENDED = tarfile.GNUTYPE_LONGNAME, (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int
    """Offset of the first byte in the opened file."""
    size: int


class Span(NamedTuple):
    """An archive in an open file: the whole file, or a member that is itself an archive."""

    file: BinaryIO
    title: str
    """Name of the archive in errors."""
    start: int
    stop: int

    def inside(self, member: Member) -> Span:
        """A member as an archive."""
        return Span(self.file, f"{member.name} in {self.title}", member.offset, member.offset + member.size)


def whole(file: BinaryIO, path: Path) -> Span:
    """The whole of an open file as an archive."""
    return Span(file, str(path), 0, path.stat().st_size)


def members(archive: Span) -> Iterator[Member]:
    """The regular files of an uncompressed tar (ustar, GNU or pax) in order, their names without a leading "./".

    Raises:
        InputError: The archive is truncated or damaged. The message holds the offset in the file.
    """
    place, name, size = archive.start, "", -1
    while (header := _header(archive, place)) is not None:
        data = place + _BLOCK
        length = 0 if header.type in _WITHOUT_DATA else header.size
        if header.type in _FILES:
            length = header.size if size < 0 else size
        place = data + -(-length // _BLOCK) * _BLOCK
        if place > archive.stop:
            raise InputError(
                f"{archive.title} is cut: {header.name} has {length} bytes from byte {data} on, and the archive ends "
                f"at byte {archive.stop}: copy it again"
            )
        if header.type == _LONG_NAME:
            name = _text(_read(archive, data, length).rstrip(b"\0"))
        elif header.type in _EXTENDED:
            try:
                name, size = _extended(_read(archive, data, length), name)
            except ValueError as error:
                raise InputError(f"{archive.title} has a damaged pax header at byte {data}: copy it again") from error
        else:
            if header.type in _FILES:
                yield Member((name or header.name).removeprefix("./"), data, length)
            name, size = "", -1


def _header(archive: Span, place: int) -> tarfile.TarInfo | None:
    """Header at an offset; None at the end mark."""
    block = _read(archive, place, min(_BLOCK, archive.stop - place))
    if len(block) < _BLOCK:
        raise InputError(
            f"{archive.title} is cut: {len(block)} bytes at byte {place}, expected a header or an end mark of "
            f"{_BLOCK}: copy it again"
        )
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    except tarfile.HeaderError as error:
        raise InputError(
            f"{archive.title} has no tar header at byte {place} ({error}), expected an uncompressed tar: it is "
            "damaged or something else, copy it again"
        ) from error


def _extended(records: bytes, name: str) -> tuple[str, int]:
    """Name and size from a pax header, if given. Its records are `length key=value`, each ended by a newline."""
    size = -1
    while records:
        digits, _, _ = records.partition(b" ")
        length = int(digits)
        key, equals, value = records[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or not len(digits) < length <= len(records):
            raise ValueError(f"record of {length} bytes")
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            size = int(value)
        records = records[length:]
    return name, size


def _read(archive: Span, place: int, length: int) -> bytes:
    archive.file.seek(place)
    return archive.file.read(length)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
