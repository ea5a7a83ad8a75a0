"""Stage `sample`: images sampled from the class-conditional model, with patch boundaries decided while sampling.

A sample is a function of (seed, sample number): its class and the uniform number behind each of its tokens come from
counters, so batch size, process count and resume point do not matter.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from conf.sample import SampleConfig
from conf.schema import RuntimeConfig
from stages.images.decode import center_crop, decode
from stages.patches.boundary_sources import entropy_sample
from stages.runtime.artifact import write_json
from stages.runtime.distributed import barrier, process_group
from stages.runtime.job import Inputs, main
from stages.runtime.progress import Progress
from stages.sampling.sampler import LABEL_STREAM, Sampler, stream
from stages.stores.entropies import EntropyStore
from stages.stores.image_index import ImageIndex
from stages.stores.patches import PatchIndex
from stages.stores.samples import SampleFacts, SampleStore, sample_writer
from stages.stores.tokens import TokenStore
from stages.views.pictures import patch_picture, sample_grid

logger = logging.getLogger(__name__)
_PICTURE_ROWS = 8
_GRID_CLASSES = 20  # rows of the grid: a thousand of them would be no picture


def sample(config: SampleConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `samples.zarr`, `grid.png`, `patches.png` and the samples' mean patch length."""
    with process_group(runtime) as world:
        store = TokenStore.of(inputs)
        sampler = Sampler.load(config, inputs, store, world.device)
        facts = SampleFacts(
            num_samples=config.num_samples,
            num_classes=store.num_classes,
            num_tokens=store.num_tokens,
            grid=store.grid,
            codebook_size=store.codebook_size,
            image_size=config.image_size,
            chunk_rows=config.batch_size,
        )
        writer = sample_writer(output / SampleStore.FILE, facts)
        labels = sample_labels(config, store.labels[: store.num_train], store.num_classes)
        units = writer.pending(world.rank, world.size)
        # The other processes are taken to be as far as this one.
        done = max(0, config.num_samples - len(units) * config.batch_size * world.size)
        progress = Progress(output, "images", config.num_samples, done=done, enabled=world.is_main)
        for unit in units:
            numbers = np.arange(config.num_samples)[writer.spec.rows(unit)]
            writer.write(unit, **sampler.sample(numbers, labels[numbers]))
            progress.update(min(config.num_samples, progress.done + len(numbers) * world.size))
        barrier()
        if world.is_main:
            writer.finish()
            _draw_pictures(config, inputs, output, store)
            write_json(output / "metrics.json", _numbers(sampler, inputs, output, store))


def sample_labels(
    config: SampleConfig, training_labels: npt.NDArray[np.uint16], num_classes: int
) -> npt.NDArray[np.int64]:
    """Class of every sample.

    "uniform" samples each on its own, as LlamaGen and ADM do. "balanced" and "data" fix the counts (equal, or the
    training images' shares, by largest remainder) and shuffle, so that any part of the samples is about as mixed.
    """
    generator = stream(config.seed, LABEL_STREAM, 0)
    if config.labels == "uniform":
        return generator.integers(num_classes, size=config.num_samples)
    weights = np.ones(num_classes)
    if config.labels == "data":
        weights = np.bincount(training_labels, minlength=num_classes).astype(np.float64)
    exact = weights / weights.sum() * config.num_samples
    counts = np.floor(exact).astype(np.int64)
    remainder = config.num_samples - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:remainder]] += 1
    return generator.permutation(np.repeat(np.arange(num_classes), counts))


def shown_classes(num_classes: int) -> npt.NDArray[np.int64]:
    """Classes that have a row in the grid: all, or evenly spread ones."""
    return np.linspace(0, num_classes - 1, min(num_classes, _GRID_CLASSES)).astype(np.int64)


def _draw_pictures(config: SampleConfig, inputs: Inputs, output: Path, store: TokenStore) -> None:
    """A row of samples for each class, or for evenly spread ones; and how real images are cut into patches."""
    samples = SampleStore.open(output / SampleStore.FILE)
    index = ImageIndex.of(inputs)
    rows = {
        index.classes[label]: samples.images(np.flatnonzero(samples.labels == label)[: config.grid_columns])
        for label in shown_classes(store.num_classes)
    }
    sample_grid(rows, config.image_size, config.grid_columns).save(output / "grid.png")
    _real_patches(inputs, store, index).save(output / "patches.png")


def _numbers(sampler: Sampler, inputs: Inputs, output: Path, store: TokenStore) -> dict[str, float]:
    """What a person compares: the samples' mean patch length, and the threshold that made it.

    A threshold that no entropy or every entropy exceeds is allowed, at the ends of an ablation, and said.
    """
    samples = SampleStore.open(output / SampleStore.FILE)
    numbers = {
        "num_samples": len(samples),
        "sample_mean_patch_length": store.num_tokens / samples.patch_starts.sum(axis=1).mean(),
    }
    if "threshold" in sampler.rule:
        threshold = sampler.rule["threshold"]
        share = entropy_sample(sampler.rule["source"], inputs).share_above(threshold)
        if share in (0.0, 1.0):
            logger.warning(
                "the threshold %.6g is exceeded by %s entropy of the training images: patches are %s",
                threshold,
                "every" if share else "no",
                "single tokens" if share else "opened by rows and max_length alone",
            )
        numbers |= {"threshold": threshold, "share_above_threshold": share}
    return numbers


def _real_patches(inputs: Inputs, store: TokenStore, index: ImageIndex) -> Image.Image:
    """Real images, at most one a class and held-out ones first, with their patches and entropies."""
    newest_first = np.arange(len(store))[::-1]  # held-out images have the highest numbers
    _, places = np.unique(store.labels[newest_first], return_index=True)
    rows = newest_first[places][:_PICTURE_ROWS]
    views = np.zeros_like(rows)
    entropies = EntropyStore.of(inputs).fetch(rows, views)
    starts = PatchIndex.of(inputs, store).starts(rows, views)
    size = store.facts.image_size
    images = np.stack([center_crop(decode(index.read(inputs["images"], int(row))), size) for row in rows])
    return patch_picture(images, starts, entropies, store.grid)


if __name__ == "__main__":
    main(sample, SampleConfig)
