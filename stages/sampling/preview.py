"""Preview of a finished model: a few samples, or continuations of a real image, as one picture. It is not cached.

The samples are those of stage `sample` for the same seed, numbers and classes.
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
from stages.sampling.sampler import Sampler
from stages.stores.image_index import ImageIndex
from stages.stores.tokens import TokenStore
from stages.views.pictures import captioned_grid, enlarged, patches_outlined, save_png

OnProgress = Callable[[int, int], None]
"""Called with the number of images that are done, and of all."""
_BATCH = 8  # images sampled together: few, so that progress is visible
_MAX_COLUMNS = 6
_BLANK = 235  # grey of the rows that are not kept


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to sample.

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
class Prefix:
    """Prefix to continue: the first `keep_rows` token rows of the image's center crop. None keeps half of the rows."""

    image: Path
    keep_rows: int | None


@dataclass(frozen=True, kw_only=True)
class PreviewReport:
    """The classes that were sampled, and how fast. Loading the models is not timed."""

    classes: list[str]
    """Of each image."""
    mean_patch_length: float
    """Tokens in a patch, on average over the patches."""
    seconds_per_image: float
    device: str


def preview(
    config: SampleConfig, inputs: Inputs, runtime: RuntimeConfig, request: Request, on_progress: OnProgress
) -> PreviewReport:
    """Sample images of some classes and write them as one picture.

    Raises:
        InputError: A class that there is not.
        ArtifactError: An artifact is damaged, or they do not belong together.
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
    """Sample the rest of a real image as of the requested classes, and write all as one picture.

    Raises:
        InputError: No class or one that there is not, no image, or rows out of range.
        ArtifactError: An artifact is damaged, or they do not belong together.
    """
    if not request.classes:
        raise InputError("no class to continue the image as: name it with --classes")
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
class _Samples:
    """Samples of some classes."""

    images: Pixels
    starts: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]
    seconds: float
    device: torch.device

    @classmethod
    def make(
        cls, sampler: Sampler, labels: npt.NDArray[np.int64], prefix: torch.Tensor | None, on_progress: OnProgress
    ) -> _Samples:
        """One sample a label, the samples 0, 1, ..., all with the same first tokens `prefix` (1, K)."""
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
        """Each image large enough to be seen."""
        if not patches:
            return [enlarged(image) for image in self.images]
        return [patches_outlined(image, starts, grid) for image, starts in zip(self.images, self.starts, strict=True)]

    def captions(self, names: Sequence[str], patches: bool) -> list[str]:
        """Class of each image, and its number of patches where they are outlined."""
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
        return decode(path.read_bytes())
    except OSError as error:
        raise InputError(f"image {path} cannot be read ({error.strerror})") from error
    except DecodeError as error:
        raise InputError(f"image {path} cannot be decoded ({error}): expected a whole picture file") from error


def _save(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int, output: Path) -> None:
    picture = captioned_grid(pictures, captions, columns)
    save_png(picture, output)
