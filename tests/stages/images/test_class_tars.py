"""Class tars that are hostile or damaged are refused in bounded time and memory, with one line."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.dataset import DatasetConfig
from stages.images.image_file import ImageFile, LeftOut
from stages.images.sources import find_images
from stages.runtime.errors import InputError

pytestmark = pytest.mark.timeout(30)  # a negative size once led around in a circle


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type, made.linkname = size, kind, link
    return made


def pack(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def images_tar(**more: bytes) -> bytes:
    return pack((info("a.png"), png()), *((info(name), data) for name, data in more.items()))


def found(root: Path) -> tuple[list[str], dict[str, str]]:
    each = list(find_images(DatasetConfig(source="imagenet_tar", root=root)))
    images = [image.relpath for image in each if isinstance(image, ImageFile)]
    return images, {item.relpath: item.reason for item in each if isinstance(item, LeftOut)}


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def patched(header: bytes, **fields: bytes) -> bytes:
    """A header with other fields, and the checksum that belongs to them."""
    places = {"size": 124, "kind": 156}
    block = bytearray(header)
    for name, value in fields.items():
        block[places[name] : places[name] + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def header(name: str = "x.png", **fields: bytes) -> bytes:
    return patched(info(name).tobuf(tarfile.GNU_FORMAT), **fields)


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return info("pax", len(records), kind).tobuf(tarfile.USTAR_FORMAT) + padded(records)


def record(key: str, value: bytes) -> bytes:
    rest = f" {key}=".encode() + value + b"\n"
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


END = bytes(1024)
HUGE_NAME = b"n" * 3_000_000
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a negative size": (lambda: header(size=b"\xff" * 12) + END, "has -1 bytes in the header at byte"),
    "a size that leads back": (lambda: header(size=b"\xff" * 10 + b"\xfa\x00") + END, "has -1536 bytes in the header"),
    "a negative size in octal": (lambda: header(size=b"-0000001000\0") + END, "has -512 bytes in the header"),
    "a size of 2^88": (lambda: header(size=b"\x80" + b"\xff" * 11) + END, "is cut"),
    "a negative size in pax": (lambda: pax(record("size", b"-512")) + header() + END, "has -512 bytes"),
    "a size of many digits in pax": (lambda: pax(record("size", b"9" * 5000)) + header() + END, "damaged pax header"),
    "a huge long name": (
        lambda: info("l", len(HUGE_NAME), b"L").tobuf(tarfile.GNU_FORMAT) + padded(HUGE_NAME) + header() + END,
        "a name of 3000000 bytes",
    ),
    "a huge pax header": (lambda: pax(record("path", HUGE_NAME)) + header() + END, "a name of 3000... bytes"),
    "many pax records": (lambda: pax(b"6 a=b\n" * 20_000) + header("../x") + END, "expected names below a folder"),
    "a pax header for all files": (
        lambda: pax(record("path", b"x.png"), tarfile.XGLTYPE) + header() + END,
        "has a pax header for all files",
    ),
    "a sparse file": (lambda: header(kind=b"S") + END, "is sparse"),
    "a sparse file in pax": (lambda: pax(record("GNU.sparse.major", b"1")) + header() + END, "holds a sparse file"),
    "a file of several volumes": (lambda: header(kind=b"M") + END, "is continued from another tar"),
    "a member beyond the end": (lambda: header(size=b"00000777777\0") + END, "is cut"),
    "a name of 20,000 characters": (
        lambda: pax(record("path", b"/" * 20_000)) + header() + END,
        "a name of 20000 characters",
    ),
    "an absolute name": (lambda: pack((info("/etc/x.png"), png())), "expected names below a folder"),
    "a name that leads out": (lambda: pack((info("deep/../../x.png"), png())), "expected names below a folder"),
    "an absolute name in pax": (lambda: pax(record("path", b"/x.png")) + header() + END, "expected names below"),
    "no end": (lambda: images_tar().rstrip(b"\0"), "is cut"),
    "nothing": (lambda: b"", "is cut"),
    "a page": (lambda: b"<!DOCTYPE html>".ljust(2048), "has no tar header"),
    "a folder alone": (lambda: header("x/", kind=b"5") + END, "holds no images"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("nested", [False, True])
def test_a_hostile_tar_is_refused_in_a_line(tmp_path: Path, case: str, nested: bool) -> None:
    make, message = HOSTILE[case]
    data = make()
    (tmp_path / "n01.tar").write_bytes(data)
    root = tmp_path
    if nested:
        root = tmp_path / "all.tar"
        root.write_bytes(pack((info("n01.tar"), data)))
    tracemalloc.start()
    with pytest.raises(InputError, match=message) as error:
        found(root)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16e6
    assert len(str(error.value)) < 1000


def test_an_inner_tar_that_claims_to_be_longer_than_the_outer_is_refused(tmp_path: Path) -> None:
    inner = header(size=b"\x80" + b"\0" * 6 + b"\xff" * 5) + images_tar()
    (tmp_path / "all.tar").write_bytes(pack((info("n01.tar"), inner), (info("n02.tar"), images_tar())))
    with pytest.raises(InputError, match=r"n01\.tar in .*all\.tar is cut"):
        found(tmp_path / "all.tar")


def test_links_devices_and_other_members_are_left_out_with_their_reason(tmp_path: Path) -> None:
    members = [
        (info("a.png"), png()),
        (info("hard.png", kind=tarfile.LNKTYPE, link="a.png"), b""),
        (info("soft.png", kind=tarfile.SYMTYPE, link="/etc/passwd"), b""),
        (info("null.png", kind=tarfile.CHRTYPE), b""),
        (info("fifo.png", kind=tarfile.FIFOTYPE), b""),
        (info("odd.png", kind=b"Y"), b"data"),
        (info("._a.png"), b"x"),
        (info("__MACOSX/a.png"), png()),
        (info("notes.txt"), b"some words"),
        (info("inner.tar"), images_tar()),
        (info("no_ending"), png()),
    ]
    (tmp_path / "n01.tar").write_bytes(pack(*members))
    (tmp_path / "readme.md").write_text("words")
    images, left_out = found(tmp_path)
    assert images == ["n01.tar/a.png", "n01.tar/no_ending"]
    assert left_out == {
        "readme.md": "no class tar",
        "n01.tar/hard.png": "a link in a tar",
        "n01.tar/soft.png": "a link in a tar",
        "n01.tar/null.png": "a device",
        "n01.tar/fifo.png": "a FIFO",
        "n01.tar/odd.png": "of the unknown kind 'Y'",
        "n01.tar/._a.png": "hidden",
        "n01.tar/__MACOSX/a.png": "made by an operating system or a tool",
        "n01.tar/notes.txt": "text",
        "n01.tar/inner.tar": "unknown contents",
    }


def test_a_long_name_before_a_long_link_is_kept(tmp_path: Path) -> None:
    name = "n" * 150 + ".png"
    data = info("l", 200, b"L").tobuf() + name.encode().ljust(512, b"\0") + info("k", 200, b"K").tobuf() + bytes(512)
    (tmp_path / "n01.tar").write_bytes(data + info("short", len(png())).tobuf() + padded(png()) + END)
    assert found(tmp_path)[0] == [f"n01.tar/{name}"]


@pytest.mark.parametrize("name", ["n02.tar.gz", "n02.tgz", "n02.TAR.XZ", "n02.tar.zst"])
def test_a_compressed_class_tar_is_refused_and_no_class_is_lost(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "n01.tar").write_bytes(images_tar())
    (tmp_path / "folder" / name).write_bytes(b"\x1f\x8b")
    (tmp_path / "all.tar").write_bytes(pack((info("n01.tar"), images_tar()), (info(name), b"\x1f\x8b")))
    for root in (tmp_path / "folder", tmp_path / "all.tar"):
        with pytest.raises(InputError, match=rf"holds {name}, which is compressed"):
            found(root)


def test_a_folder_of_images_beside_class_tars_is_refused(tmp_path: Path) -> None:
    (tmp_path / "n01.tar").write_bytes(images_tar())
    (tmp_path / "n02").mkdir()
    (tmp_path / "n02" / "a.png").write_bytes(png())
    with pytest.raises(InputError, match="n02 is a folder with images beside class tars"):
        found(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/n01.tar", "val/n01.tar"], "holds two class tars called n01.tar"),
        (["n01.tar", "val.tar"], "holds val.tar, expected a tar for each class"),
        (["n01.tar", "a\nb.tar"], "expected a name of one line"),
        (["n01.tar", "../n02.tar"], "expected names below a folder"),
    ],
)
def test_class_tars_whose_names_cannot_be_used_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "all.tar").write_bytes(pack(*((info(name), images_tar()) for name in names)))
    with pytest.raises(InputError, match=message):
        found(tmp_path / "all.tar")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "n01.tar").write_bytes(images_tar())
    for kind in ("FIFO", "device", "folder", "opened"):
        path = tmp_path / "n02.tar"
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("nothing")
        with pytest.raises(InputError, match=rf"n02\.tar (is a {kind}|cannot be {kind})"):
            found(tmp_path)
        path.rmdir() if kind == "folder" else path.unlink()
