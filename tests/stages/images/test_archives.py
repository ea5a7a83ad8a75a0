"""Tar archives read in place, held against the standard library on every format it can write."""

import gzip
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stages.images.archives import Member, members, whole
from stages.runtime.errors import InputError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "folder/" + "n" * 80 + "/" + "ä" * 90 + ".JPEG"


def pack(path: Path, files: dict[str, bytes], kind: str = "gnu") -> Path:
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if kind == "pax":
                info.mtime = 1.25  # has no place in the plain header
            tar.addfile(info, io.BytesIO(data))
    return path


def listed(path: Path) -> list[Member]:
    with path.open("rb") as file:
        return list(members(whole(file, path)))


def contents(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {member.name: data[member.offset : member.offset + member.size] for member in listed(path)}


@pytest.mark.parametrize("kind", FORMATS)
def test_members_are_those_of_the_standard_library(tmp_path: Path, kind: str) -> None:
    files = {"a.JPEG": b"x" * 700, "b.JPEG": b"", "c.JPEG": b"y" * 512}
    if kind != "ustar":
        files |= {LONG: b"long", "after.JPEG": b"short again"}
    path = pack(tmp_path / "a.tar", files, kind)
    assert contents(path) == files
    with tarfile.open(path) as tar:
        assert [tuple(member) for member in listed(path)] == [(m.name, m.offset_data, m.size) for m in tar]


def test_folders_and_links_are_passed_over_and_leading_dots_dropped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("./images", tarfile.DIRTYPE), ("./images/link", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere" * 30
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("./images/a.png"))
    assert [member.name for member in listed(tmp_path / "a.tar")] == ["images/a.png"]


def test_sizes_beyond_eight_gigabytes_are_read(tmp_path: Path) -> None:
    for kind in ("gnu", "pax"):
        info = tarfile.TarInfo("big")
        info.size = 9 << 30
        path = tmp_path / f"{kind}.tar"
        with path.open("wb") as file:
            start = file.write(info.tobuf(FORMATS[kind]))
            file.truncate(start + info.size)  # a hole, not nine gigabytes
            file.seek(0, io.SEEK_END)
            file.write(bytes(1024))
        assert listed(path) == [("big", start, 9 << 30)]


def test_an_archive_in_an_archive_is_read_where_it_lies(tmp_path: Path) -> None:
    inner = pack(tmp_path / "inner.tar", {"1.JPEG": b"one", "2.JPEG": b"two"})
    outer = pack(tmp_path / "outer.tar", {"first.tar": inner.read_bytes(), "second.tar": inner.read_bytes()})
    data = outer.read_bytes()

    def nested() -> Iterator[bytes]:
        with outer.open("rb") as file:
            archive = whole(file, outer)
            for class_tar in members(archive):
                for member in members(archive.inside(class_tar)):
                    yield data[member.offset : member.offset + member.size]

    assert list(nested()) == [b"one", b"two"] * 2


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (0, r"a\.tar is cut: 0 bytes at byte 0, expected a header"),
        (300, r"a\.tar is cut: 300 bytes at byte 0"),
        (600, r"a\.tar is cut: 0\.JPEG has 700 bytes from byte 512 on, and the archive ends at byte 600"),
        (1536, r"a\.tar is cut: 0 bytes at byte 1536, expected a header or an end mark"),  # after a whole member
        (1600, r"a\.tar is cut: 64 bytes at byte 1536"),
    ],
)
def test_a_cut_archive_is_refused_with_the_place(tmp_path: Path, kept: int, message: str) -> None:
    path = pack(tmp_path / "a.tar", {f"{number}.JPEG": b"x" * 700 for number in range(3)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=message):
        listed(path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", {LONG: b"x" * 700, "b.JPEG": b"y"}, "pax")
    data = path.read_bytes()
    last = listed(path)[-1]
    for kept in range(0, last.offset + 512 + 1, 64):
        path.write_bytes(data[:kept])
        with pytest.raises(InputError, match=r"a\.tar is cut"):
            listed(path)


def test_a_damaged_header_is_refused_with_the_place_and_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", {f"{number}.JPEG": b"x" * 700 for number in range(3)})
    data = bytearray(path.read_bytes())
    data[1536 + 100] ^= 1
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 1  # what the standard library makes of it
    with pytest.raises(InputError, match=r"a\.tar has no tar header at byte 1536"):
        listed(path)


@pytest.mark.parametrize(
    "record", [b"0 path=x\n", b"-3 path=x\n", b"5 ab\n", b"path=x\n", b"99999 path", b"9 size=x\n"]
)
def test_a_damaged_pax_header_is_refused(tmp_path: Path, record: bytes) -> None:
    info = tarfile.TarInfo("extended")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + bytes(1024))
    with pytest.raises(InputError, match=r"a\.tar has a damaged pax header at byte 512"):
        listed(path)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", {"a.JPEG": np.random.default_rng(0).bytes(2000)})
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match=r"expected an uncompressed tar"):
        listed(path)
