"""The images of a source as columns. A million images as Python objects would take half a gigabyte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from conf.dataset import DatasetConfig
from stages.images.sources import ImageFile, find_images
from stages.runtime.errors import InputError

MAX_CLASSES = 65535  # labels are stored as uint16, and its last value marks missing ones
_BLOCK = 4096  # images that are objects at the same time


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Listing:
    """Images (N,), sorted by path. A slice of it is a listing too."""

    relpaths: NDArray[np.str_]
    """Of numpy's StringDType, which takes a third of a list of str."""
    offsets: NDArray[np.int64]
    """As in `ImageFile`."""
    sizes: NDArray[np.int64]
    """As in `ImageFile`."""
    labels: NDArray[np.uint16]
    """Place of each image's class in `classes`."""
    classes: list[str]
    """In the order of their names."""

    def __len__(self) -> int:
        return len(self.relpaths)

    def __getitem__(self, rows: slice) -> Listing:
        return Listing(
            relpaths=self.relpaths[rows],
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
            labels=self.labels[rows],
            classes=self.classes,
        )

    def __iter__(self) -> Iterator[ImageFile]:
        columns = (self.relpaths, self.labels.tolist(), self.offsets.tolist(), self.sizes.tolist())
        for relpath, label, offset, size in zip(*columns, strict=True):
            yield ImageFile(relpath, self.classes[label], offset, size)


def list_images(config: DatasetConfig) -> Listing:
    """All images of a source.

    Raises:
        InputError: What `find_images` raises; too many classes; two images of one name in a tar.
    """
    found, numbers = find_images(config), dict[str, int]()
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
    if np.any(order[1:] < order[:-1]):  # as a rule classes come sorted, and a copy of the names can be spared
        relpaths = relpaths[order]
    _refuse_twins(relpaths)
    return Listing(
        relpaths=relpaths, offsets=offsets[order], sizes=sizes[order], labels=rank[labels[order]], classes=classes
    )


def _refuse_twins(relpaths: NDArray[np.str_]) -> None:
    """A tar may hold two members of one name, a folder may not."""
    twins = np.flatnonzero(relpaths[1:] == relpaths[:-1])
    if len(twins):
        raise InputError(f"two images are called {relpaths[twins[0]]}: make the archive again with one of them")
