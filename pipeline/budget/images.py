"""Number of images of a run, and where it is known from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from conf.dataset import DatasetConfig
from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.plan import cached_paths, plan
from stages.runtime.errors import InputError

IMAGENET = 1_281_167, 1000
_PREFIX = "imagenet"  # presets of ImageNet, whose images need not be there to plan a run


class ImageCount(NamedTuple):
    """Images and classes, and where the numbers are from, in words."""

    images: int
    classes: int
    origin: str


def count_images(
    settings: Settings, runtime: RuntimeConfig, preset: str | None = None, given: int | None = None
) -> ImageCount:
    """Images of a run: the number given, else of the cached index, else ImageNet's for its presets, else counted.

    Raises:
        InputError: There is neither an index nor a folder of images.
    """
    found = _indexed(settings, runtime)
    if given is not None:
        return ImageCount(given, IMAGENET[1] if found is None else found.classes, "--images")
    if found is not None:
        return found
    if (preset or "").startswith(_PREFIX) or settings.dataset.source == "imagenet_tar":
        return ImageCount(*IMAGENET, "ImageNet, training images")
    return _listed(settings.dataset)


def _indexed(settings: Settings, runtime: RuntimeConfig) -> ImageCount | None:
    """Images of the cached index of these settings; None if it is not cached."""
    try:
        path = cached_paths(plan(settings, runtime)).get("dataset")
    except (InputError, OSError):  # the images are not there
        return None
    return None if path is None else _of_index(path)


def _of_index(path: Path) -> ImageCount:
    from stages.stores.image_index import ImageIndex

    index = ImageIndex.open(path)
    return ImageCount(len(index), len(index.classes), "index of stage dataset")


def _listed(config: DatasetConfig) -> ImageCount:
    from stages.images.image_file import ImageFile
    from stages.images.sources import find_images, image_root

    classes = set[str]()
    images = 0
    for image in find_images(config):
        if isinstance(image, ImageFile):
            classes.add(image.class_name)
            images += 1
    return ImageCount(images, len(classes), f"count of {image_root(config)}")
