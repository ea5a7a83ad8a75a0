"""Listings: sorted by path, each image with its own place and class, and slices that are listings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conf.dataset import DatasetConfig
from stages.images import listing
from stages.images.image_file import ImageFile, LeftOut
from stages.images.listing import Listing, list_images
from stages.runtime.errors import InputError

FOUND = [  # as a source may give them: classes in an order of its own
    ImageFile("z.tar/b.png", "zebra", 5120, 70),
    ImageFile("z.tar/a.png", "zebra", 512, 60),
    ImageFile("m.tar/c.png", "ant", 1024, 80),
    ImageFile("m.tar/é.png", "ant", 2048, 90),
    ImageFile("m.tar/10.png", "ant", 4096, 50),
]
CONFIG = DatasetConfig(source="imagenet_tar", root=Path("train.tar"))


@pytest.fixture(params=[2, 4096])
def given(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[ImageFile | LeftOut]:
    """The images that a source finds; few or many are objects at the same time."""
    images: list[ImageFile | LeftOut] = list(FOUND)

    def find(config: DatasetConfig) -> Iterator[ImageFile | LeftOut]:
        assert config is CONFIG
        yield from images

    monkeypatch.setattr(listing, "find_images", find)
    monkeypatch.setattr(listing, "_BLOCK", request.param)
    return images


def rows(images: Listing) -> list[tuple[str, int, int, int]]:
    columns = (images.relpaths, images.labels, images.offsets, images.sizes)
    return [(str(path), int(label), int(offset), int(size)) for path, label, offset, size in zip(*columns, strict=True)]


@pytest.mark.usefixtures("given")
def test_images_are_sorted_by_path_and_keep_what_belongs_to_them() -> None:
    images = list_images(CONFIG)
    assert images.classes == ["ant", "zebra"], "in the order of their names, not of their paths"
    assert rows(images) == [
        ("m.tar/10.png", 0, 4096, 50),
        ("m.tar/c.png", 0, 1024, 80),
        ("m.tar/é.png", 0, 2048, 90),
        ("z.tar/a.png", 1, 512, 60),
        ("z.tar/b.png", 1, 5120, 70),
    ]
    assert list(images) == sorted(FOUND)
    assert (images.labels.dtype, images.offsets.dtype, images.sizes.dtype) == (np.uint16, np.int64, np.int64)


@pytest.mark.usefixtures("given")
def test_a_slice_is_a_listing_with_all_classes() -> None:
    images = list_images(CONFIG)
    part = images[3:]
    assert (len(part), part.classes) == (2, ["ant", "zebra"])
    assert rows(part) == rows(images)[3:]
    assert list(part) == sorted(FOUND)[3:]
    assert list(images[2:2]) == []


def test_twins_are_refused_wherever_they_lie(given: list[ImageFile | LeftOut]) -> None:
    given.append(ImageFile("z.tar/b.png", "zebra", 9216, 70))
    with pytest.raises(InputError, match=r"two images are called z\.tar/b\.png: make the archive again with one"):
        list_images(CONFIG)


def test_as_many_classes_as_labels_can_tell_and_no_more(
    given: list[ImageFile | LeftOut], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MAX_CLASSES", 2)
    assert len(list_images(CONFIG).classes) == 2
    given.append(ImageFile("b.tar/a.png", "bee", 512, 60))
    with pytest.raises(InputError, match=r"train\.tar holds 3 classes, expected at most 2"):
        list_images(CONFIG)


def test_what_is_left_out_is_counted_by_reason(given: list[ImageFile | LeftOut]) -> None:
    given.insert(0, LeftOut("z.tar/notes.txt", "text"))
    given.insert(3, LeftOut("z.tar/.hidden", "hidden"))
    given.append(LeftOut("m.tar/\udcff.txt", "text"))
    images = list_images(CONFIG)
    assert list(images) == sorted(FOUND)
    assert {reason: (files.count, files.first) for reason, files in images[:1].left_out.items()} == {
        "text": (2, ["z.tar/notes.txt", r"m.tar/\udcff.txt"]),
        "hidden": (1, ["z.tar/.hidden"]),
    }
