"""Preview of a finished model: a few samples, or continuations of a real image, as one picture.

The samples equal those of stage `sample` for the same seed, numbers and classes. Previews are not cached.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Int64
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from conf.runtime import RuntimeConfig
from conf.sample import SampleConfig
from stages.images.decode import DecodeError, center_crop, decode
from stages.images.image_file import read_image
from stages.images.names import labels_of
from stages.runtime.arrays import PixelBatch, Starts
from stages.runtime.distributed import process_group
from stages.runtime.errors import InputError
from stages.runtime.job import Inputs
from stages.sampling.sampler import Sampler
from stages.stores.image_index import ImageIndex
from stages.stores.tokens import TokenStore
from stages.views.pictures import captioned_grid, enlarged, patches_outlined, save_png

OnProgress = Callable[[int, int], None]
"""Called with the number of images sampled so far, and the number of all images."""
Labels = Int64[NDArray[np.int64], " n"]
_BATCH = 8  # images sampled together: few, so that progress is visible
_MAX_COLUMNS = 6
_BLANK = 235  # grey level of the rows that are not kept


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to sample.

    Attributes:
        classes: Names or numbers. Empty means all classes, or evenly spread ones if there are more classes than images.
        count: Number of images, divided among the classes.
        patches: Outline the patches.
        output: PNG file to write.
    """

    classes: Sequence[str]
    count: int
    patches: bool
    output: Path


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Prefix to continue: the first `keep_rows` token rows of the image's center crop. None keeps half of the rows."""

    image: Path
    keep_rows: int | None


@dataclass(frozen=True, kw_only=True)
class PreviewReport:
    """Result of a preview."""

    classes: list[str]
    """Class of each image."""
    mean_patch_length: float
    """Tokens per patch, averaged over the patches."""
    seconds_per_image: float
    """Sampling time, without loading the models."""
    device: str


def preview(
    config: SampleConfig, inputs: Inputs, runtime: RuntimeConfig, request: Request, on_progress: OnProgress
) -> PreviewReport:
    """Sample images of some classes and write them as one picture.

    Raises:
        InputError: A class does not exist.
        ArtifactError: An artifact is damaged, or the artifacts do not belong together.
    """
    names = ImageIndex.of(inputs).classes
    labels = np.sort(spread(chosen_classes(request.classes, names), request.count))
    with process_group(runtime) as world:
        store = TokenStore.of(inputs)
        sampler = Sampler.load(config, inputs, store, world.device)
        samples = _Samples.make(sampler, labels, None, on_progress)
    pictures = samples.pictures(store.grid, request.patches)
    _save(pictures, samples.captions(names, request.patches), math.ceil(math.sqrt(len(pictures))), request.output)
    return samples.report(names)


def continue_image(
    config: SampleConfig,
    inputs: Inputs,
    runtime: RuntimeConfig,
    request: Request,
    start: Prefix,
    on_progress: OnProgress,
) -> PreviewReport:
    """Continue a real image as each of the requested classes, and write the results as one picture.

    Raises:
        InputError: No class is given or a class does not exist, the image cannot be read, or the rows are out of range.
        ArtifactError: An artifact is damaged, or the artifacts do not belong together.
    """
    if not request.classes:
        raise InputError("no class is given for the continuation, expected at least one: set --classes")
    names = ImageIndex.of(inputs).classes
    labels = spread(chosen_classes(request.classes, names), request.count)
    store = TokenStore.of(inputs)
    grid, size = store.grid, config.image_size
    rows = grid // 2 if start.keep_rows is None else start.keep_rows
    if not 0 < rows < grid:
        raise InputError(f"--keep-rows is {rows}, expected 1..{grid - 1}: an image has {grid} rows of tokens")
    original = _open(start.image)
    with process_group(runtime) as world:
        sampler = Sampler.load(config, inputs, store, world.device)
        tokens = sampler.encode(np.stack([center_crop(original, store.facts.image_size)]))
        kept = sampler.decode(tokens)[0]
        samples = _Samples.make(sampler, labels, tokens[:, : rows * grid], on_progress)
    kept[round(rows * size / grid) :] = _BLANK
    pictures = [enlarged(center_crop(original, size)), enlarged(kept), *samples.pictures(grid, request.patches)]
    captions = ["original", f"kept: {rows} of {grid} rows", *samples.captions(names, request.patches)]
    _save(pictures, captions, math.ceil(len(pictures) / math.ceil(len(pictures) / _MAX_COLUMNS)), request.output)
    return samples.report(names)


def chosen_classes(wanted: Sequence[str], names: Sequence[str]) -> Labels:
    """Labels of classes given by name or number, see `labels_of`; all labels if none is given.

    Raises:
        InputError: A class does not exist, or a word means several.
    """
    return np.array(labels_of(wanted, names) or range(len(names)), dtype=np.int64)


def spread(classes: Labels, count: int) -> Int64[NDArray[np.int64], " {count}"]:
    """Labels of `count` images: classes in turn, or evenly spread classes if there are more classes than images."""
    if count >= len(classes):
        return np.resize(classes, count)
    return classes[np.linspace(0, len(classes) - 1, count).round().astype(np.int64)]


@dataclass(frozen=True)
class _Samples:
    """Samples of some classes."""

    images: PixelBatch
    starts: Starts
    labels: Labels
    seconds: float
    """Time to sample all of them."""
    device: torch.device

    @classmethod
    def make(
        cls, sampler: Sampler, labels: Labels, prefix: Int[Tensor, "1 M"] | None, on_progress: OnProgress
    ) -> _Samples:
        """Samples 0, 1, ..., one for each label. With a `prefix`, all start with its tokens."""
        on_progress(0, len(labels))
        began, parts = time.perf_counter(), []
        for first in range(0, len(labels), _BATCH):
            part = labels[first : first + _BATCH]
            given = None if prefix is None else prefix.expand(len(part), -1)
            parts.append(sampler.sample(np.arange(first, first + len(part)), part, given))
            on_progress(first + len(part), len(labels))
        return cls(
            images=np.concatenate([part["images"] for part in parts]),
            starts=np.concatenate([part["patch_starts"] for part in parts]),
            labels=labels,
            seconds=time.perf_counter() - began,
            device=sampler.device,
        )

    def pictures(self, grid: int, patches: bool) -> list[Image.Image]:
        """Enlarged images, with patches outlined on request."""
        if not patches:
            return [enlarged(image) for image in self.images]
        return [patches_outlined(image, starts, grid) for image, starts in zip(self.images, self.starts, strict=True)]

    def captions(self, names: Sequence[str], patches: bool) -> list[str]:
        """Class of each image, and its number of patches if patches are outlined."""
        counts = self.starts.sum(axis=1)
        return [
            names[label] + (f", {count} patches" if patches else "")
            for label, count in zip(self.labels, counts, strict=True)
        ]

    def report(self, names: Sequence[str]) -> PreviewReport:
        return PreviewReport(
            classes=[names[label] for label in self.labels],
            mean_patch_length=self.starts.size / int(self.starts.sum()),
            seconds_per_image=self.seconds / len(self.labels),
            device=str(self.device),
        )


def _open(path: Path) -> Image.Image:
    try:
        return decode(read_image(path.parent, path.name, 0, -1))
    except OSError as error:
        raise InputError(f"image {path} cannot be read ({error.strerror})") from error
    except DecodeError as error:
        raise InputError(f"image {path} cannot be decoded ({error}): expected a whole picture file") from error


def _save(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int, output: Path) -> None:
    picture = captioned_grid(pictures, captions, columns)
    save_png(picture, output)
