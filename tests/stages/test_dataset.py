import io
import json
import os
import re
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stages.dataset
import stages.images.listing
import stages.stores.image_index
from conf.dataset import DatasetConfig
from conf.runtime import RuntimeConfig
from conf.section import Section
from stages.dataset import dataset
from stages.images.listing import Listing
from stages.images.sources import image_root
from stages.runtime.artifact import read_json
from stages.runtime.errors import ArtifactError, InputError
from stages.stores.image_index import ImageIndex

BROKEN_LIST = "record/broken.json"
LEFT_OUT_LIST = "record/left_out.json"


def make_images(root: Path, classes: str = "ab", count: int = 10) -> None:
    generator = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}{number}.png")


def run(root: Path, output: Path, **settings: object) -> ImageIndex:
    config = DatasetConfig(root=root, **settings)
    dataset(config, {"images": image_root(config)}, output, RuntimeConfig(threads=2))
    return ImageIndex.open(output)


def content(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def test_the_index_holds_every_image_with_its_facts(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    index = run(tmp_path / "images", tmp_path / "out")
    assert index.classes == ["a", "b"]
    assert list(index.relpaths) == sorted(f"{name}/{name}{number}.png" for name in "ab" for number in range(10))
    assert index.labels.tolist() == [0] * 10 + [1] * 10
    assert (len(index), index.num_train, index.num_heldout, index.source) == (20, 20, 0, "image_folder")
    data = (tmp_path / "images" / index.relpaths[13]).read_bytes()
    assert index.read(tmp_path / "images", 13) == data
    assert index.sizes[13] == len(data)


def as_tar(root: Path, path: Path) -> Path:
    """The class folders of `root` as a tar of class tars."""
    with tarfile.open(path, "w") as outer:
        for folder in sorted(root.iterdir()):
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w") as inner:
                for image in sorted(folder.iterdir()):
                    inner.add(image, image.name)
            info = tarfile.TarInfo(f"{folder.name}.tar")
            info.size = packed.tell()
            packed.seek(0)
            outer.addfile(info, packed)
    return path


def test_a_tar_gives_the_images_labels_and_split_of_its_folders(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    (tmp_path / "images" / "b" / "b7.png").write_bytes(b"hello")
    path = as_tar(tmp_path / "images", tmp_path / "train.tar")
    folders = run(tmp_path / "images", tmp_path / "out1", heldout_fraction=0.2, max_broken_fraction=0.1)
    packed = run(path, tmp_path / "out2", heldout_fraction=0.2, max_broken_fraction=0.1, source="imagenet_tar")
    assert [name.replace(".tar/", "/") for name in packed.relpaths] == list(folders.relpaths)
    assert (packed.classes, packed.num_train, packed.source) == (folders.classes, folders.num_train, "imagenet_tar")
    assert np.array_equal(packed.labels, folders.labels)
    assert np.array_equal(packed.digests, folders.digests)
    for image in range(len(folders)):
        assert packed.read(path, image) == folders.read(tmp_path / "images", image)
    assert json.loads((tmp_path / "out2" / BROKEN_LIST).read_text()) == [
        {"relpath": "b.tar/b7.png", "reason": "not an image of a known format"}
    ]


def test_a_tar_that_was_cut_or_changed_or_went_since_is_noticed_when_read(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    path = as_tar(tmp_path / "images", tmp_path / "train.tar")
    index = run(path, tmp_path / "out", source="imagenet_tar")
    whole = path.read_bytes()
    path.write_bytes(whole[: index.offsets[19] + 5])
    with pytest.raises(InputError, match=r"b\.tar/b9\.png is not the file that the dataset stage indexed \(5 bytes"):
        index.read(path, 19)
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(InputError, match="is not the file that the dataset stage indexed"):
        index.read(path, 3)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        index.read(path, 3)


def test_an_index_of_several_row_groups_is_read_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path / "images")
    one = run(tmp_path / "images", tmp_path / "one", heldout_fraction=0.2)
    monkeypatch.setattr(stages.stores.image_index, "_ROW_GROUP", 7)
    several = run(tmp_path / "images", tmp_path / "several", heldout_fraction=0.2)
    for name in ("relpaths", "offsets", "sizes", "digests", "labels"):
        assert np.array_equal(getattr(one, name), getattr(several, name)), name


BROKEN = {
    "a cut JPEG": (lambda jpeg: jpeg[:-100], "OSError: .*truncated"),
    "a page with the name of an image": (lambda jpeg: b"<!DOCTYPE html><title>404</title>", "not an image of a known"),
    "an empty file": (lambda jpeg: b"", "empty file"),
    "zeros": (lambda jpeg: bytes(5000), "not an image of a known format"),
    "a bomb": (lambda jpeg: png_header(30000, 30000), "DecompressionBombError"),
}


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99))))
    framed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_whole_image_is_left_out_with_a_reason_that_every_machine_gives(tmp_path: Path, case: str) -> None:
    make_images(tmp_path / "images")
    spoil, reason = BROKEN[case]
    jpeg = io.BytesIO()
    Image.open(tmp_path / "images" / "a" / "a0.png").save(jpeg, "JPEG")
    (tmp_path / "images" / "a" / "bad.JPEG").write_bytes(spoil(jpeg.getvalue()))
    index = run(tmp_path / "images", tmp_path / "out", max_broken_fraction=0.1)
    (broken,) = json.loads((tmp_path / "out" / BROKEN_LIST).read_text())
    assert broken["relpath"] == "a/bad.JPEG"
    assert re.search(reason, broken["reason"])
    assert str(tmp_path) not in broken["reason"]
    assert "0x" not in broken["reason"]
    assert len(index) == 20


def test_a_png_in_the_name_of_a_jpeg_is_an_image_like_any_other(tmp_path: Path) -> None:
    make_images(tmp_path / "images")  # ImageNet has one
    (tmp_path / "images" / "a" / "a3.png").rename(tmp_path / "images" / "a" / "a3.JPEG")
    index = run(tmp_path / "images", tmp_path / "out", max_broken_fraction=0)
    assert len(index) == 20
    assert index.relpaths[3] == "a/a3.JPEG"


def test_held_out_images_come_last_and_are_a_share_of_each_class(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    index = run(tmp_path / "images", tmp_path / "out", heldout_fraction=0.3)
    train, heldout = list(index.relpaths[: index.num_train]), list(index.relpaths[index.num_train :])
    assert (index.num_train, index.num_heldout) == (14, 6)
    assert [path[0] for path in heldout] == ["a"] * 3 + ["b"] * 3
    assert train == sorted(train)
    assert heldout == sorted(heldout)
    assert not set(train) & set(heldout)


def test_who_is_held_out_depends_on_file_names_alone(tmp_path: Path) -> None:
    make_images(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "a").rename(tmp_path / "two" / "z")
    first = run(tmp_path / "one", tmp_path / "out1", heldout_fraction=0.2)
    second = run(tmp_path / "two", tmp_path / "out2", heldout_fraction=0.2)
    names = [{path[2:] for path in index.relpaths[index.num_train :]} for index in (first, second)]
    assert names[0] == names[1]


def test_broken_images_are_listed_with_their_reason_and_left_out(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    cut = tmp_path / "images" / "a" / "a3.png"
    cut.write_bytes(cut.read_bytes()[:300])
    (tmp_path / "images" / "b" / "b7.png").write_bytes(b"hello")
    index = run(tmp_path / "images", tmp_path / "out", max_broken_fraction=0.1)
    broken = json.loads((tmp_path / "out" / BROKEN_LIST).read_text())
    assert [entry["relpath"] for entry in broken] == ["a/a3.png", "b/b7.png"]
    assert "truncated" in broken[0]["reason"]
    assert broken[1]["reason"] == "not an image of a known format"
    assert len(index) == 18
    assert not {"a/a3.png", "b/b7.png"} & set(index.relpaths)


def test_the_view_counts_images_classes_and_broken_ones(
    tmp_path: Path, draw_view: Callable[[str, Section, dict[str, Path]], Path]
) -> None:
    make_images(tmp_path / "images")
    (tmp_path / "images" / "b" / "b7.png").write_bytes(b"hello")
    for name in ("readme.md", "a/notes.txt"):
        (tmp_path / "images" / name).write_text("words")
    settings = {"heldout_fraction": 0.3, "max_broken_fraction": 0.1}
    run(tmp_path / "images", tmp_path / "out", **settings)
    config = DatasetConfig(root=tmp_path / "images", **settings)
    assert read_json(draw_view("dataset", config, {"dataset": tmp_path / "out"}) / "metrics.json") == {
        "num_images": 19,
        "num_train": 13,
        "num_heldout": 6,
        "num_classes": 2,
        "num_broken": 1,
        "num_left_out": 2,
    }


def test_too_many_broken_images_fail_and_are_named(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    (tmp_path / "images" / "b" / "b7.png").write_bytes(b"hello")
    with pytest.raises(InputError, match=r"1 of 20 images are broken, expected at most 4\.00%.*b/b7\.png \(not an"):
        run(tmp_path / "images", tmp_path / "out", max_broken_fraction=0.04)


def test_a_class_that_lost_all_its_images_fails(tmp_path: Path) -> None:
    make_images(tmp_path / "images", "ab", 1)
    (tmp_path / "images" / "b" / "b0.png").write_bytes(b"hello")
    with pytest.raises(InputError, match="class b holds no image that decodes"):
        run(tmp_path / "images", tmp_path / "out", max_broken_fraction=0.5)


def test_an_image_that_changed_or_went_is_noticed_when_read(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    index = run(tmp_path / "images", tmp_path / "out")
    path = tmp_path / "images" / index.relpaths[4]
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # same size, other bytes
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"{path.name} is not the file that the dataset stage indexed"):
        index.read(tmp_path / "images", 4)
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name} cannot be read"):
        index.read(tmp_path / "images", 4)


def test_a_killed_attempt_is_continued_without_reading_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.dataset, "BLOCK", 8)
    make_images(tmp_path / "images")
    run(tmp_path / "images", tmp_path / "whole", heldout_fraction=0.2)

    read: list[str] = []
    original = stages.dataset._check

    def dies_in_the_second_block(root: Path, images: Listing, max_pixels: int) -> stages.dataset.Checked:
        if "a/a9.png" in images.relpaths:
            raise KeyboardInterrupt
        return original(root, images, max_pixels)

    def counting(root: Path, images: Listing, max_pixels: int) -> stages.dataset.Checked:
        read.extend(images.relpaths)
        return original(root, images, max_pixels)

    monkeypatch.setattr(stages.dataset, "_check", dies_in_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "images", tmp_path / "killed", heldout_fraction=0.2)
    monkeypatch.setattr(stages.dataset, "_check", counting)
    run(tmp_path / "images", tmp_path / "killed", heldout_fraction=0.2)
    assert len(read) == 12
    assert content(tmp_path / "killed") == content(tmp_path / "whole") != {}


def test_a_file_changed_since_the_killed_attempt_is_read_again(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    run(tmp_path / "images", tmp_path / "out")
    (tmp_path / "images" / "a" / "a1.png").write_bytes((tmp_path / "images" / "b" / "b2.png").read_bytes())
    index = run(tmp_path / "images", tmp_path / "out")
    assert index.read(tmp_path / "images", 1) == (tmp_path / "images" / "b" / "b2.png").read_bytes()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every image that is read and decoded."""
    read: list[str] = []
    original = stages.dataset._check

    def check(root: Path, images: Listing, max_pixels: int) -> stages.dataset.Checked:
        read.extend(images.relpaths)
        return original(root, images, max_pixels)

    monkeypatch.setattr(stages.dataset, "_check", check)
    return read


def test_a_file_replaced_by_one_of_its_size_and_time_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    make_images(tmp_path / "images")
    path = tmp_path / "images" / "a" / "a1.png"
    run(tmp_path / "images", tmp_path / "out")
    assert len(reads) == 20
    run(tmp_path / "images", tmp_path / "out")
    assert len(reads) == 20
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(InputError, match="broken"):
        run(tmp_path / "images", tmp_path / "out", max_broken_fraction=0)
    assert len(reads) == 40


def test_a_link_that_leads_to_another_file_of_its_size_and_time_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    make_images(tmp_path / "images")
    path, first, second = tmp_path / "images" / "a" / "a1.png", tmp_path / "1.png", tmp_path / "2.png"
    shutil.copy(path, first)
    shutil.copy(path, second)
    os.utime(first, ns=(10**18, 10**18))
    os.utime(second, ns=(10**18, 10**18))
    for target, expected in ((first, 20), (first, 20), (second, 40)):
        path.unlink()
        path.symlink_to(target)
        run(tmp_path / "images", tmp_path / "out")
        assert len(reads) == expected


@pytest.mark.parametrize("damage", ["cut", "empty", "not a zip", "a flipped bit", "other arrays"])
def test_a_damaged_record_of_a_killed_attempt_is_made_again(
    tmp_path: Path, reads: list[str], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    make_images(tmp_path / "images")
    run(tmp_path / "images", tmp_path / "out", heldout_fraction=0.2)
    before = content(tmp_path / "out")
    (record,) = (tmp_path / "out" / "record" / "units").iterdir()
    whole = record.read_bytes()
    if damage == "other arrays":
        np.savez(record, stamp=np.zeros(16, np.uint8))
    else:
        middle = whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]
        record.write_bytes({"cut": whole[:-9], "empty": b"", "not a zip": b"hello"}.get(damage, middle))
    reads.clear()
    run(tmp_path / "images", tmp_path / "out", heldout_fraction=0.2)
    assert len(reads) == 20
    assert content(tmp_path / "out") == before
    assert f"{record} is damaged" in caplog.text
    run(tmp_path / "images", tmp_path / "out", heldout_fraction=0.2)
    assert len(reads) == 20  # the record is whole again


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    make_images(tmp_path / "images", "a", 2)
    run(tmp_path / "images", tmp_path / "out")
    path = tmp_path / "out" / "images.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ArtifactError, match=r"images\.parquet cannot be read"):
        ImageIndex.open(tmp_path / "out")


def test_what_is_left_out_is_counted_and_listed_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "images"
    make_images(root, "ab", 2)
    for name in ("a/one.txt", "a/two.txt", "b/.hidden.png", "b/line\nbreak.txt"):
        (root / name).write_text("words")
    (root / "a" / "a0.png").rename(root / "a" / "a0")
    with caplog.at_level("INFO"):
        index = run(root, tmp_path / "out")
    assert len(index) == 4
    assert read_json(tmp_path / "out" / LEFT_OUT_LIST) == {
        "hidden": {"count": 1, "first": ["b/.hidden.png"]},
        "text": {"count": 3, "first": ["a/one.txt", "a/two.txt", "b/line\\nbreak.txt"]},
    }
    (line,) = [each for each in caplog.messages if "left out" in each]
    assert "3 text (first a/one.txt)" in line
    assert "1 hidden (first b/.hidden.png)" in line
    assert "\n" not in line


def test_the_layout_that_was_read_is_logged_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path / "images" / "train", "ab", 1)
    make_images(tmp_path / "images" / "val", "ab", 1)
    with caplog.at_level("INFO"):
        run(tmp_path / "images", tmp_path / "out")
    assert read_json(tmp_path / "out" / "record" / "layout.json") == {
        "root": "dataset.root/train",
        "classes": "the folders directly below it",
        "num_classes": 2,
    }
    assert read_json(tmp_path / "out" / LEFT_OUT_LIST) == {"beside the split train": {"count": 1, "first": ["val/"]}}
    assert "root is dataset.root/train, classes are the folders directly below it: 2 (first a, b)" in caplog.messages


@pytest.mark.timeout(20)
def test_what_cannot_be_read_is_listed_as_broken_and_never_waited_for(tmp_path: Path) -> None:
    root = tmp_path / "images"
    make_images(root)
    os.mkfifo(root / "a" / "fifo.png")
    (root / "a" / "zero.png").symlink_to("/dev/zero")
    (root / "a" / "to_fifo").symlink_to("fifo.png")
    (root / "b" / "lost").symlink_to("nothing")
    (root / "b" / "loop.jpg").symlink_to("loop.jpg")
    with (root / "b" / "huge.bmp").open("wb") as file:
        file.truncate(2**40)  # a hole
    index = run(root, tmp_path / "out", max_broken_fraction=0.3)
    assert {entry["relpath"]: entry["reason"] for entry in read_json(tmp_path / "out" / BROKEN_LIST)} == {
        "a/fifo.png": "cannot be read: a FIFO",
        "a/to_fifo": "cannot be read: a FIFO",
        "a/zero.png": "cannot be read: a device",
        "b/huge.bmp": "cannot be read: 1099511627776 bytes, expected at most 1073741824",
        "b/lost": "cannot be read: a link that leads nowhere",
        "b/loop.jpg": "cannot be read: a link that leads nowhere",
    }
    assert len(index) == 20


@pytest.mark.timeout(20)
def test_an_indexed_image_that_became_a_fifo_is_noticed_when_read(tmp_path: Path) -> None:
    make_images(tmp_path / "images", "a", 2)
    index = run(tmp_path / "images", tmp_path / "out")
    path = tmp_path / "images" / "a" / "a1.png"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"a1\.png cannot be read \(a FIFO\)"):
        index.read(tmp_path / "images", 1)


def test_an_image_of_too_many_pixels_is_broken_and_the_setting_is_named(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    index = run(tmp_path / "images", tmp_path / "out", max_pixels=28 * 30, max_broken_fraction=0.1)
    reason = "30 x 29 pixels, expected at most 840 (dataset.max_pixels)"
    assert read_json(tmp_path / "out" / BROKEN_LIST) == [
        {"relpath": "a/a9.png", "reason": reason},
        {"relpath": "b/b9.png", "reason": reason},
    ]
    assert len(index) == 18


def test_broken_images_are_all_listed_when_there_are_too_many(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    for number in range(8):
        (tmp_path / "images" / "b" / f"b{number}.png").write_bytes(b"hello")
    with pytest.raises(InputError, match=r"8 of 20 images are broken.*all in record/broken\.json"):
        run(tmp_path / "images", tmp_path / "out")
    assert len(read_json(tmp_path / "out" / BROKEN_LIST)) == 8


def test_a_share_that_holds_no_image_out_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path / "images")
    with pytest.raises(InputError, match=r"heldout_fraction is 0\.04 and the largest class has 10 images, so none is"):
        run(tmp_path / "images", tmp_path / "out", heldout_fraction=0.04)
    make_images(tmp_path / "images", "c", 2)
    assert run(tmp_path / "images", tmp_path / "out", heldout_fraction=0.1).num_heldout == 2
    assert "1 classes are too small to hold an image out (first c)" in caplog.messages


def test_captions_beside_a_million_images_do_not_fill_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.images.listing, "_NAMED", 3)
    make_images(tmp_path / "images", "ab", 2)
    for number in range(5):
        (tmp_path / "images" / "a" / f"{number}.txt").write_text("a caption")
    run(tmp_path / "images", tmp_path / "out")
    listed = {"text": {"count": 5, "first": ["a/0.txt", "a/1.txt", "a/2.txt"]}}
    assert read_json(tmp_path / "out" / LEFT_OUT_LIST) == listed
