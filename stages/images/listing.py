"""The images of a source as columns. A million images as Python objects would need half a gigabyte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from conf.dataset import DatasetConfig
from stages.images.image_file import ImageFile, LeftOut
from stages.images.names import shown
from stages.images.sources import find_images
from stages.runtime.errors import InputError

MAX_CLASSES = 65535  # labels are stored as uint16, and its last value marks missing ones
_BLOCK = 4096  # images that exist as Python objects at a time
_NAMED = 10_000  # files left out for one reason that are kept by name: a caption beside each image would be a million


@dataclass(slots=True)
class LeftOutFiles:
    """Files and folders that are left out for one reason."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    """Their paths, at most _NAMED."""

    def add(self, relpath: str) -> None:
        """Count a file."""
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(shown(relpath))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Listing:
    """Images (N,), sorted by path. A slice of a listing is a listing."""

    relpaths: NDArray[np.str_]
    """numpy's StringDType, which needs a third of the memory of a list of str."""
    offsets: NDArray[np.int64]
    """As in `ImageFile`."""
    sizes: NDArray[np.int64]
    """As in `ImageFile`."""
    labels: NDArray[np.uint16]
    """Index of each image's class in `classes`."""
    classes: list[str]
    """Sorted by name."""
    left_out: dict[str, LeftOutFiles]
    """What the source holds beside images, by the reason why it is left out."""

    def __len__(self) -> int:
        return len(self.relpaths)

    def __getitem__(self, rows: slice) -> Listing:
        return Listing(
            relpaths=self.relpaths[rows],
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
            labels=self.labels[rows],
            classes=self.classes,
            left_out=self.left_out,
        )

    def __iter__(self) -> Iterator[ImageFile]:
        columns = (self.relpaths, self.labels.tolist(), self.offsets.tolist(), self.sizes.tolist())
        for relpath, label, offset, size in zip(*columns, strict=True):
            yield ImageFile(relpath, self.classes[label], offset, size)


def list_images(config: DatasetConfig) -> Listing:
    """All images of a source.

    Raises:
        InputError: As in `find_images`, or there are too many classes, or two images in a tar have the same name.
    """
    left_out: dict[str, LeftOutFiles] = {}
    found, numbers = _only_images(find_images(config), left_out), dict[str, int]()
    blocks = []
    while block := list(islice(found, _BLOCK)):
        blocks.append(
            (
                np.array([image.relpath for image in block], dtype=np.dtypes.StringDType()),
                np.array([numbers.setdefault(image.class_name, len(numbers)) for image in block], np.int32),
                np.array([image.offset for image in block], np.int64),
                np.array([image.size for image in block], np.int64),
            )
        )
    relpaths, labels, offsets, sizes = (np.concatenate(column) for column in zip(*blocks, strict=True))
    blocks.clear()
    if len(numbers) > MAX_CLASSES:
        raise InputError(f"{config.root} holds {len(numbers)} classes, expected at most {MAX_CLASSES}")
    classes = sorted(numbers)
    rank = np.empty(len(classes), np.uint16)
    rank[[numbers[name] for name in classes]] = np.arange(len(classes))
    order = np.argsort(relpaths, kind="stable")
    if np.any(order[1:] < order[:-1]):  # usually classes are sorted, and no copy is needed
        relpaths = relpaths[order]
    _refuse_twins(relpaths)
    return Listing(
        relpaths=relpaths,
        offsets=offsets[order],
        sizes=sizes[order],
        labels=rank[labels[order]],
        classes=classes,
        left_out=left_out,
    )


def _only_images(found: Iterator[ImageFile | LeftOut], left_out: dict[str, LeftOutFiles]) -> Iterator[ImageFile]:
    """The images; everything else is counted in `left_out`."""
    for each in found:
        if isinstance(each, ImageFile):
            yield each
        else:
            left_out.setdefault(each.reason, LeftOutFiles()).add(each.relpath)


def _refuse_twins(relpaths: NDArray[np.str_]) -> None:
    """Two members of a tar may have the same name, unlike two files in a folder."""
    twins = np.flatnonzero(relpaths[1:] == relpaths[:-1])
    if len(twins):
        raise InputError(f"two images are called {relpaths[twins[0]]}: make the archive again with one of them")
