"""A quick look at a finished model: a few images, or continuations of a real one, as one picture and without the cache.

The samples are those that stage `sample` would draw for the same seed, numbers and classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from conf.sample import SampleConfig
from conf.schema import RuntimeConfig
from stages.images.decode import DecodeError, Pixels, center_crop, decode
from stages.runtime.distributed import process_group
from stages.runtime.errors import InputError
from stages.runtime.job import Inputs
from stages.sampling.sampler import Drawer
from stages.stores.image_index import ImageIndex
from stages.stores.tokens import TokenStore
from stages.views.pictures import captioned_grid, enlarged, patches_outlined, save_png

OnProgress = Callable[[int, int], None]
"""Called with the images that are drawn, and all of them."""
_TOGETHER = 8  # images drawn at once: few, so that something is seen to happen
_WIDEST = 6  # pictures beside each other
_BLANK = 235  # grey of what is not given yet


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What to look at.

    Attributes:
        classes: Names or numbers; none stands for all classes, evenly spread where there are more than images.
        count: Images, shared out among the classes.
        patches: Outline the patches.
        output: The picture, a PNG.
    """

    classes: Sequence[str]
    count: int
    patches: bool
    output: Path


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What is given of an image: the first `keep_rows` rows of tokens of its middle square; None is half of them."""

    image: Path
    keep_rows: int | None


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was drawn, and how fast; loading the models is not counted."""

    classes: list[str]
    """Of each image."""
    mean_patch_length: float
    """Tokens in a patch, on average over the patches."""
    seconds_per_image: float
    device: str


def look(config: SampleConfig, inputs: Inputs, runtime: RuntimeConfig, wish: Wish, on_progress: OnProgress) -> Look:
    """Draw images of some classes and write them as one picture.

    Raises:
        InputError: A class that there is not.
        ArtifactError: An artifact is damaged, or they do not belong together.
    """
    names = ImageIndex.open(inputs["dataset"]).classes
    labels = np.sort(spread(chosen_classes(wish.classes, names), wish.count))
    with process_group(runtime) as world:
        store = TokenStore.open(inputs["tokenize"] / "tokens.zarr")
        drawer = Drawer.load(config, inputs, store, world.device)
        drawn = _Batch.draw(drawer, labels, None, on_progress)
    pictures = drawn.pictures(store.grid, wish.patches)
    _save(pictures, drawn.captions(names, wish.patches), math.ceil(math.sqrt(len(pictures))), wish.output)
    return drawn.report(names)


def continue_image(
    config: SampleConfig,
    inputs: Inputs,
    runtime: RuntimeConfig,
    wish: Wish,
    beginning: Beginning,
    on_progress: OnProgress,
) -> Look:
    """Keep the beginning of a real image and draw the rest, as of the classes wished for; write all as one picture.

    Raises:
        InputError: No class or one that there is not, no image, or rows out of range.
        ArtifactError: An artifact is damaged, or they do not belong together.
    """
    if not wish.classes:
        raise InputError("no class to continue the image as: name it with --classes")
    names = ImageIndex.open(inputs["dataset"]).classes
    labels = spread(chosen_classes(wish.classes, names), wish.count)
    store = TokenStore.open(inputs["tokenize"] / "tokens.zarr")
    grid, size = store.grid, config.image_size
    rows = grid // 2 if beginning.keep_rows is None else beginning.keep_rows
    if not 0 < rows < grid:
        raise InputError(f"--keep-rows is {rows}, expected 1..{grid - 1}: an image has {grid} rows of tokens")
    original = _open(beginning.image)
    with process_group(runtime) as world:
        drawer = Drawer.load(config, inputs, store, world.device)
        tokens = drawer.encode(np.stack([center_crop(original, store.facts.image_size)]))
        kept = drawer.decode(tokens)[0]
        drawn = _Batch.draw(drawer, labels, tokens[:, : rows * grid], on_progress)
    kept[round(rows * size / grid) :] = _BLANK
    pictures = [enlarged(center_crop(original, size)), enlarged(kept), *drawn.pictures(grid, wish.patches)]
    captions = ["original", f"kept: {rows} of {grid} rows", *drawn.captions(names, wish.patches)]
    _save(pictures, captions, math.ceil(len(pictures) / math.ceil(len(pictures) / _WIDEST)), wish.output)
    return drawn.report(names)


def chosen_classes(wanted: Sequence[str], names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Labels of classes given by name or number; of all classes if none is given.

    Raises:
        InputError: A class that there is not.
    """
    by_name = {name.casefold(): label for label, name in enumerate(names)}
    by_number = {str(label): label for label in range(len(names))}
    labels = []
    for word in wanted:
        label = by_name.get(word.casefold(), by_number.get(word))
        if label is None:
            raise InputError(
                f"class {word!r} is unknown, expected a number 0..{len(names) - 1} or a name, as {names[0]!r}"
            )
        labels.append(label)
    return np.array(labels or range(len(names)), dtype=np.int64)


def spread(classes: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Labels of `count` images: each class about as often, or evenly spread classes where there are more of them."""
    if count >= len(classes):
        return np.resize(classes, count)
    return classes[np.linspace(0, len(classes) - 1, count).round().astype(np.int64)]


@dataclass(frozen=True)
class _Batch:
    """Images that were drawn."""

    images: Pixels
    starts: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]
    seconds: float
    device: torch.device

    @classmethod
    def draw(
        cls, drawer: Drawer, labels: npt.NDArray[np.int64], prefix: torch.Tensor | None, on_progress: OnProgress
    ) -> _Batch:
        """Draw one image a label, the samples 0, 1, ..., all with the same first tokens `prefix` (1, K)."""
        on_progress(0, len(labels))
        began, parts = time.perf_counter(), []
        for first in range(0, len(labels), _TOGETHER):
            part = labels[first : first + _TOGETHER]
            given = None if prefix is None else prefix.expand(len(part), -1)
            parts.append(drawer.draw(np.arange(first, first + len(part)), part, given))
            on_progress(first + len(part), len(labels))
        return cls(
            images=np.concatenate([part["images"] for part in parts]),
            starts=np.concatenate([part["patch_starts"] for part in parts]),
            labels=labels,
            seconds=time.perf_counter() - began,
            device=drawer.device,
        )

    def pictures(self, grid: int, patches: bool) -> list[Image.Image]:
        """Each image large enough to be seen."""
        if not patches:
            return [enlarged(image) for image in self.images]
        return [patches_outlined(image, starts, grid) for image, starts in zip(self.images, self.starts, strict=True)]

    def captions(self, names: Sequence[str], patches: bool) -> list[str]:
        """Class of each image, and in how many patches it was drawn where they are outlined."""
        counts = self.starts.sum(axis=1)
        return [
            names[label] + (f", {count} patches" if patches else "")
            for label, count in zip(self.labels, counts, strict=True)
        ]

    def report(self, names: Sequence[str]) -> Look:
        return Look(
            classes=[names[label] for label in self.labels],
            mean_patch_length=self.starts.size / int(self.starts.sum()),
            seconds_per_image=self.seconds / len(self.labels),
            device=str(self.device),
        )


def _open(path: Path) -> Image.Image:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise InputError(f"image {path} cannot be read ({error.strerror})") from error
    except DecodeError as error:
        raise InputError(f"image {path} cannot be decoded ({error}): expected a whole picture file") from error


def _save(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int, output: Path) -> None:
    picture = captioned_grid(pictures, captions, columns)
    save_png(picture, output)
