"""Tar archives read in place: the position of each member, found by reading headers only.

The standard library's `tarfile` keeps an object for each member, and takes damage after the first header for the end of
the archive. This reader keeps no members, and an archive without an end mark is an error.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from stages.runtime.errors import InputError

_BLOCK = tarfile.BLOCKSIZE
_EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_KINDS = {  # of members without data
    tarfile.LNKTYPE: "a link in a tar",
    tarfile.SYMTYPE: "a link in a tar",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a FIFO",
}
_SCATTERED = {tarfile.GNUTYPE_SPARSE: "sparse", b"M": "continued from another tar"}
_MAX_NAME = 2**20  # bytes of a header that holds a name; the longest path has 4,096


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int
    """Offset of the first byte in the opened file."""
    size: int


class Span(NamedTuple):
    """An archive in an open file: the whole file, or a member that is itself an archive."""

    file: IO[bytes]
    title: str
    """Name of the archive in errors."""
    start: int
    stop: int

    def inside(self, member: Member) -> Span:
        """A member as an archive."""
        return Span(self.file, f"{member.name} in {self.title}", member.offset, member.offset + member.size)


class _Pending(NamedTuple):
    """What headers say about the member that follows them."""

    name: str = ""
    size: int | None = None


def whole(file: IO[bytes], path: Path) -> Span:
    """The whole of an open file as an archive."""
    return Span(file, str(path), 0, os.fstat(file.fileno()).st_size)


def members(archive: Span) -> Iterator[Member]:
    """The regular files of an uncompressed tar (ustar, GNU or pax) in order, their names without a leading "./".

    Raises:
        InputError: As in `entries`.
    """
    return (member for member, kind in entries(archive) if kind is None)


def entries(archive: Span) -> Iterator[tuple[Member, str | None]]:
    """The members of an uncompressed tar but its folders; with what each is, None for a regular file.

    Every header lies behind the one before it, so the end is reached whatever the headers say.

    Raises:
        InputError: The archive is truncated or damaged, or holds a file in parts. The message holds the offset in the
            file.
    """
    place, pending = archive.start, _Pending()
    while (header := _header(archive, place)) is not None:
        data, length = place + _BLOCK, _length(archive, header, pending, place)
        place = data + -(-length // _BLOCK) * _BLOCK
        if place > archive.stop:
            raise InputError(
                f"{archive.title} is cut: {header.name} has {length} bytes from byte {data} on, and the archive ends "
                f"at byte {archive.stop}: copy it again"
            )
        if header.type == tarfile.GNUTYPE_LONGNAME:
            pending = pending._replace(name=_text(_name_data(archive, data, length).rstrip(b"\0")))
        elif header.type in (*_EXTENDED, tarfile.XGLTYPE):
            said = _extended(archive, data, length)
            if header.type != tarfile.XGLTYPE:
                pending = _Pending(said.name or pending.name, pending.size if said.size is None else said.size)
            elif said != _Pending():
                raise InputError(
                    f"{archive.title} has a pax header for all files at byte {data}: make it again without"
                )
        elif header.type != tarfile.GNUTYPE_LONGLINK:
            if header.type != tarfile.DIRTYPE:
                name = (pending.name or header.name).removeprefix("./")
                yield Member(name, data, length), _kind(header.type)
            pending = _Pending()


def _length(archive: Span, header: tarfile.TarInfo, pending: _Pending, place: int) -> int:
    """Number of bytes that follow a header."""
    if header.type in _SCATTERED:
        raise InputError(
            f"{archive.title} holds {header.name}, which is {_SCATTERED[header.type]}, at byte {place}: make it again "
            "with whole files"
        )
    if header.type in _KINDS:
        return 0
    length = header.size if header.type not in _FILES or pending.size is None else pending.size
    if length < 0:
        raise InputError(
            f"{archive.title} is damaged: {header.name} has {length} bytes in the header at byte {place}: copy it again"
        )
    return length


def _kind(type_flag: bytes) -> str | None:
    return None if type_flag in _FILES else _KINDS.get(type_flag, f"of the unknown kind {_text(type_flag)!a}")


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


def _extended(archive: Span, data: int, length: int) -> _Pending:
    """Name and size from a pax header, if given. Its records are `length key=value`, each ended by a newline."""
    records = _name_data(archive, data, length)
    name, size, first = "", None, 0
    try:
        while first < len(records):
            digits = records[first : first + 20].partition(b" ")[0]
            end = first + int(digits)
            key, equals, value = records[first + len(digits) + 1 : end - 1].partition(b"=")
            if not equals or not first + len(digits) < end <= len(records):
                raise ValueError(f"record of {end - first} bytes")
            if key.startswith(b"GNU.sparse."):
                raise InputError(f"{archive.title} holds a sparse file at byte {data}: make it again with whole files")
            name = _text(value) if key == b"path" else name
            size = int(value) if key == b"size" else size
            first = end
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{archive.title} has a damaged pax header at byte {data}: copy it again") from error
    return _Pending(name, size)


def _name_data(archive: Span, data: int, length: int) -> bytes:
    if length > _MAX_NAME:
        raise InputError(
            f"{archive.title} is damaged: a name of {length} bytes at byte {data}, expected at most {_MAX_NAME}: copy "
            "it again"
        )
    return _read(archive, data, length)


def _read(archive: Span, place: int, length: int) -> bytes:
    archive.file.seek(place)
    return archive.file.read(length)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
