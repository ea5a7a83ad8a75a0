"""Class folders: which folder is the root, what is a class, what is left out, and what is refused as a guess."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.dataset import DatasetConfig
from stages.images.class_folders import layout_of
from stages.images.image_file import ImageFile, LeftOut
from stages.images.sources import describe_layout, find_images, image_root
from stages.runtime.errors import InputError


def make(root: Path, *relpaths: str) -> None:
    """Files below a root: a PNG, a text, or nothing, by the ending. A path that ends with "/" is a folder."""
    for relpath in relpaths:
        path = root / relpath
        if relpath.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".txt", ".md", ".json"):
            path.write_text("some words")
        else:
            Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(path, "PNG")


def found(root: Path) -> tuple[list[str], dict[str, str]]:
    """Paths of the images, and of what is left out with its reason."""
    each = list(find_images(DatasetConfig(root=root)))
    images = [image.relpath for image in each if isinstance(image, ImageFile)]
    return images, {item.relpath: item.reason for item in each if isinstance(item, LeftOut)}


def test_what_is_no_image_is_left_out_with_its_reason(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png", "a/notes.txt", "a/.hidden.png", "a/._1.png", "a/Thumbs.db", "a/@eaDir/1.png/thumb.jpg")
    make(tmp_path, "b/2.png", "b/.ipynb_checkpoints/2-checkpoint.png", "__MACOSX/b/._2.png", "lost+found/", ".git/x")
    make(tmp_path, "loose.png", "readme.md", "@eaDir/a/1.png")
    (tmp_path / "b" / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    hidden, system = "hidden", "made by an operating system or a tool"
    assert found(tmp_path) == (
        ["a/1.png", "b/2.png"],
        {
            ".git/": hidden,
            "@eaDir/": system,
            "__MACOSX/": system,
            "lost+found/": system,
            "loose.png": "in no class folder",
            "readme.md": "in no class folder",
            "a/.hidden.png": hidden,
            "a/._1.png": hidden,
            "a/@eaDir/": system,
            "a/Thumbs.db": system,
            "a/notes.txt": "text",
            "b/.ipynb_checkpoints/": hidden,
            "b/clip.mp4": "a video",
        },
    )


@pytest.mark.parametrize("name", ["x.jfif", "x", "x.PNG", "x.JPG", "x.txt", "x.jpg.bak", "x.", "x.tar", "x y.z"])
def test_images_are_known_by_their_contents(tmp_path: Path, name: str) -> None:
    make(tmp_path, "a/1.png")
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / name)
    assert found(tmp_path) == ([f"a/{name}"], {})


def test_what_cannot_be_read_is_listed_as_an_image_for_the_stage_to_name(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png")
    (tmp_path / "a" / "dangling").symlink_to("nothing")
    (tmp_path / "a" / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "a" / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "a" / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path / "a")  # a socket's path is short
        server.bind("socket")
        os.chdir(here)
    assert found(tmp_path) == (
        [f"a/{name}" for name in ("1.png", "dangling", "fifo", "loop.jpg", "socket", "zero")],
        {},
    )


def test_links_to_folders_inside_a_class_are_named_and_not_followed(tmp_path: Path) -> None:
    make(tmp_path, "root/a/1.png", "elsewhere/2.png")
    (tmp_path / "root" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "a" / "up").symlink_to("..")
    reason = "a link to a folder, which is not followed"
    assert found(tmp_path / "root") == (["a/1.png"], {"a/more/": reason, "a/up/": reason})


@pytest.mark.parametrize("empty", ["b/", "b/notes.txt", "b/.hidden.png", "b/deep/deeper/", "b/@eaDir/1.png"])
def test_a_class_without_images_is_refused(tmp_path: Path, empty: str) -> None:
    make(tmp_path, "a/1.png", empty)
    with pytest.raises(InputError, match=r"class folder .*/b holds no images, expected files"):
        found(tmp_path)


@pytest.mark.parametrize("target", ["nothing", "b", "/nothing/at/all"])
def test_a_class_that_is_a_link_to_nowhere_is_refused(tmp_path: Path, target: str) -> None:
    make(tmp_path, "a/1.png")
    (tmp_path / "b").symlink_to(target)
    with pytest.raises(InputError, match=r"/b is a link that leads nowhere, expected a class folder"):
        image_root(DatasetConfig(root=tmp_path))


@pytest.mark.parametrize("target", [".", "..", "/", "../root"])
def test_a_class_that_is_a_link_to_what_contains_it_is_refused(tmp_path: Path, target: str) -> None:
    make(tmp_path, "root/a/1.png")
    (tmp_path / "root" / "b").symlink_to(target)
    with pytest.raises(InputError, match=r"/b is a link to a folder that contains it"):
        image_root(DatasetConfig(root=tmp_path / "root"))


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A class folder that this process may not list, beside one that it may. Root may list everything: be nobody."""
    with tempfile.TemporaryDirectory() as folder:
        root, is_root = Path(folder), os.geteuid() == 0
        make(root, "a/1.png", "b/2.png", "b/deep/3.png")
        root.chmod(0o755)
        if is_root:
            os.seteuid(65534)
        try:
            yield root
        finally:
            if is_root:
                os.seteuid(0)


@pytest.mark.parametrize("folder", ["b", "b/deep"])
def test_a_folder_that_cannot_be_listed_is_refused(unreadable: Path, folder: str) -> None:
    user = os.geteuid()
    if user == 65534:
        os.seteuid(0)
    (unreadable / folder).chmod(0)
    os.seteuid(user)
    with pytest.raises(InputError, match=rf"{folder} cannot be listed \(Permission denied\)"):
        found(unreadable)
    os.seteuid(0 if user == 65534 else user)
    (unreadable / folder).chmod(0o755)


GUESSES = {
    "splits with images and no classes": (["train/1.png", "val/2.png"], "train/, val/"),
    "a stray image in train": (["train/cat/1.png", "train/stray.png", "val/cat/2.png"], "train/, val/"),
    "a split beside classes": (["plane/1.png", "car/2.png", "train/express/3.png", "train/freight/4.png"], "train/ "),
    "a test set beside classes": (["cat/1.png", "dog/2.png", "test/3.png"], "test/ beside cat, dog"),
    "one split that is not train": (["val/cat/1.png", "val/dog/2.png"], "val/"),
    "other words for splits": (["Training/cat/1.png", "Testing/cat/2.png"], "Testing/, Training/"),
    "splits with a number": (["train2017/1.png", "val2017/2.png"], "train2017/, val2017/"),
    "splits below train": (["train/train/1.png", "train/test/2.png"], "test/, train/"),
    "splits below each class": (["cat/train/1.png", "cat/val/2.png", "dog/train/3.png"], "train/, val/"),
    "train alone with images": (["train/1.png"], "train/"),
    "an empty train": (["train/", "val/cat/1.png"], "train/, val/"),
    "an image without an ending in train": (["train/cat/1.png", "train/stray", "val/cat/2.png"], "train/, val/"),
    "two vehicles": (["boat/1.png", "train/2.png", "val/3.png"], "train/, val/ beside boat"),
}


@pytest.mark.parametrize("case", GUESSES)
def test_a_layout_that_can_be_read_in_two_ways_is_refused(tmp_path: Path, case: str) -> None:
    files, named = GUESSES[case]
    make(tmp_path, *files)
    with pytest.raises(InputError, match=rf"holds {named}.*the names may mean splits or classes"):
        found(tmp_path)


@pytest.mark.parametrize(
    "beside",
    [
        [],
        ["val/1.png"],
        ["val/cat/1.png", "test/2.png"],
        ["devkit/data/meta.txt", "readme.md", "stray.png"],
        [".git/x"],
    ],
)
def test_imagenets_layout_is_read_and_what_lies_beside_train_is_named(tmp_path: Path, beside: list[str]) -> None:
    make(tmp_path, "train/cat/1.png", "train/dog/2.png", "train/classes.txt", *beside)
    config = DatasetConfig(root=tmp_path)
    assert image_root(config) == tmp_path / "train"
    assert describe_layout(config)["root"] == "dataset.root/train"
    images, left_out = found(tmp_path)
    assert images == ["cat/1.png", "dog/2.png"]
    assert left_out.pop("train/classes.txt") == "in no class folder"
    assert {path.split("/")[0] for path in left_out} == {path.split("/")[0] for path in beside}


def test_the_layout_of_plain_class_folders_is_told(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.png", "dog/2.png")
    assert describe_layout(DatasetConfig(root=tmp_path)) == {
        "root": "dataset.root",
        "classes": "the folders directly below it",
    }
    assert layout_of(tmp_path).classes == ["cat", "dog"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "loop"])
def test_a_root_that_is_no_folder_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "r"
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "fifo":
            os.mkfifo(root)
        elif kind == "device":
            root.symlink_to("/dev/zero")
        elif kind == "socket":
            server.bind(str(root))
        else:
            root.symlink_to(root)
        for source in ("image_folder", "imagenet_tar"):
            with pytest.raises(
                InputError, match=r"dataset\.root .* is (a FIFO|a device|a socket|unreadable).*, expected"
            ):
                image_root(DatasetConfig(root=root, source=source))


def test_a_class_folder_whose_name_is_no_utf8_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png")
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        image_root(DatasetConfig(root=tmp_path))
