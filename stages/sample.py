"""Stage `sample`: images sampled from the class-conditional model. Patch boundaries are decided during sampling.

A sample is a function of (seed, sample number). Its class and its uniform random numbers come from counter-based
generators, so batch size, process count and resume point do not affect it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt16
from numpy.typing import NDArray

from conf.runtime import RuntimeConfig
from conf.sample import SampleConfig
from stages.runtime.artifact import write_json
from stages.runtime.distributed import process_group
from stages.runtime.job import Inputs, main
from stages.runtime.progress import Progress
from stages.runtime.randomness import Purpose, stream
from stages.sampling.sampler import SampleBatch, Sampler
from stages.stores.samples import SampleFacts, SampleStore, sample_writer
from stages.stores.tokens import TokenStore
from stages.stores.writing import write_as_made

logger = logging.getLogger(__name__)


def sample(config: SampleConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `samples.zarr`, and `boundaries.json` with the boundary source and its rule (empty without patches)."""
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

        def make(pending: Sequence[int], progress: Progress) -> Iterator[tuple[int, SampleBatch]]:
            units = [np.arange(config.num_samples)[writer.spec.rows(unit)] for unit in pending]
            for index, batch in sampler.sample_units(units, labels, progress):
                yield pending[index], batch

        pending = writer.pending(world.rank, world.size)
        write_as_made(writer, make, pending=pending, output=output, what="images", world=world)
    if world.is_main:
        writer.finish()
        write_json(output / "boundaries.json", sampler.rule)


def sample_labels(
    config: SampleConfig, training_labels: UInt16[NDArray[np.uint16], " n"], num_classes: int
) -> Int64[NDArray[np.int64], " N"]:
    """Class of every sample.

    "uniform" samples each label independently, as LlamaGen and ADM do. "balanced" and "data" fix the number of samples
    per class (equal, or proportional to the training images, by largest remainder) and shuffle the labels.
    """
    generator = stream(config.seed, Purpose.LABELS)
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


if __name__ == "__main__":
    main(sample, SampleConfig)
