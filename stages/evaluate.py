"""Stage `evaluate`: features of the samples, of the training images, and of the image sets of the ladder.

The ladder gives reference points for a score. Its rungs have the same number of images: held-out images (the limit for
a perfect model), their reconstructions by the tokenizer, the samples, images of tokens sampled from each position's
marginal distribution, and images of random tokens. The view of this stage computes the scores from the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import numpy as np
import torch

from conf.evaluate import EvaluateConfig
from conf.runtime import RuntimeConfig
from models.vq import VQModel
from stages.images.decode import center_crop, decode
from stages.images.from_tokens import images_of_tokens
from stages.runtime.arrays import Features, Indices, PixelBatch, Tokens
from stages.runtime.artifact import RECORD, file_sha256, read_arrays, write_atomic
from stages.runtime.distributed import World, barrier, process_group
from stages.runtime.job import Inputs, main
from stages.runtime.progress import Progress
from stages.runtime.randomness import Purpose, stream
from stages.runtime.transfer import to_device
from stages.scores.feature_sets import ExtractorInfo, FeatureSets
from stages.scores.features import INCEPTION_SHA256, Extractor, Inception, Lite0
from stages.scores.statistics import FeatureStats
from stages.scores.unigram import sample_marginals
from stages.stores.image_index import ImageIndex
from stages.stores.matching import require_tokenizer
from stages.stores.samples import SampleStore
from stages.stores.tokens import TokenStore
from stages.weights.inception import read_inception
from stages.weights.own import load_vq

_UNIT = 512  # images in a feature file, the unit of work and of resume


def evaluate(config: EvaluateConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `features.npz` with the features of every set, and `extractor.json` with the feature network.

    For the reference, `features.npz` holds mean and covariance, and the features that precision and recall use.

    Raises:
        InputError: The feature network's weights are missing or damaged.
        ArtifactError: The tokens were made by another tokenizer.
    """
    with process_group(runtime) as world:
        extractor = _extractor(config, world)
        sets = ImageSets.open(config, inputs, world)
        units = [(name, unit) for name, images in sets.items() for unit in range(images.num_units)]
        folder = output / RECORD / "features"
        mine = [unit for unit in units[world.rank :: world.size] if _load(folder, *unit) is None]
        progress = Progress(output, "batches", len(mine), enabled=world.is_main)
        for done, (name, unit) in enumerate(mine, 1):
            features, logits = _extract(extractor, sets[name].unit(unit), config.batch_size)
            arrays = {"features": features, "logits": logits}
            write_atomic(_unit_path(folder, name, unit), lambda file, a=arrays: np.savez(file, **a))  # type: ignore[misc]
            progress.update(done, name)
        barrier()
    if world.is_main:
        _collect_sets(folder, sets, extractor, config.compared).write(output)


@dataclass(frozen=True)
class ImageSet:
    """A set of images, which are generated or read a batch at a time."""

    rows: Indices
    make: Callable[[Indices], PixelBatch]
    """Images of some rows."""

    @property
    def num_units(self) -> int:
        """Number of feature files."""
        return -(-len(self.rows) // _UNIT)

    def unit(self, number: int) -> Callable[[int], Iterator[PixelBatch]]:
        """A function from the batch size to the batches of one unit."""
        rows = self.rows[number * _UNIT : (number + 1) * _UNIT]

        def batches(size: int) -> Iterator[PixelBatch]:
            for first in range(0, len(rows), size):
                yield self.make(rows[first : first + size])

        return batches


class ImageSets:
    """The image sets: the reference, the samples and the rungs of the ladder."""

    def __init__(self, inputs: Inputs, world: World, seed: int) -> None:
        self.index = ImageIndex.of(inputs)
        self.samples = SampleStore.of(inputs)
        self.inputs, self.root, self.seed, self.device = inputs, inputs["images"], seed, world.device

    @cached_property
    def tokens(self) -> TokenStore:
        """Read for the ladder alone."""
        return TokenStore.of(self.inputs)

    @cached_property
    def vq(self) -> VQModel:
        """Read for the ladder alone."""
        return load_vq(self.inputs["tokenizer"], self.device)

    @classmethod
    def open(cls, config: EvaluateConfig, inputs: Inputs, world: World) -> dict[str, ImageSet]:
        """The reference and the samples; also the rungs of the ladder if images are held out.

        Raises:
            ArtifactError: An artifact is damaged, or the tokens were made by another tokenizer.
        """
        self = cls(inputs, world, config.seed)
        training = np.arange(self.index.num_train)
        if config.max_reference is not None and len(training) > config.max_reference:
            training = training[np.linspace(0, len(training) - 1, config.max_reference).astype(np.int64)]
        sets = {
            "reference": ImageSet(training, self._real),
            "samples": ImageSet(np.arange(len(self.samples)), self.samples.images),
        }
        heldout = np.arange(self.index.num_train, len(self.index))[: len(self.samples)]
        if not config.ladder or not len(heldout):
            return sets
        require_tokenizer(inputs["tokenizer"], self.tokens)
        count = len(heldout)
        blocks = self.tokens.training_blocks()
        marginals = sample_marginals(blocks, self.index.num_train, self.tokens.num_tokens, count, self.seed)
        shape = (count, self.tokens.num_tokens)
        random = stream(self.seed, Purpose.RANDOM_TOKENS).integers(self.tokens.codebook_size, size=shape)
        return sets | {
            "heldout": ImageSet(heldout, self._real),
            "reconstruction": ImageSet(heldout, self._reconstructed),
            "marginals": ImageSet(np.arange(count), lambda rows: self._decode(marginals[rows])),
            "random": ImageSet(np.arange(count), lambda rows: self._decode(random[rows])),
        }

    def _real(self, rows: Indices) -> PixelBatch:
        size = self.samples.facts.image_size
        return np.stack([center_crop(decode(self.index.read(self.root, int(row))), size) for row in rows])

    def _reconstructed(self, rows: Indices) -> PixelBatch:
        return self._decode(self.tokens.fetch(rows, np.zeros_like(rows)))

    def _decode(self, tokens: Tokens) -> PixelBatch:
        """Images of tokens, resized as the samples are."""
        here = to_device(torch.from_numpy(tokens.astype(np.int64)), self.device)
        return images_of_tokens(self.vq, here, self.samples.facts.image_size)


def _extractor(config: EvaluateConfig, world: World) -> Extractor:
    if config.extractor == "lite0":
        return Lite0(config.input_size, world.device)
    assert config.weights is not None, "the schema asks for them"
    return Inception(read_inception(config.weights), file_sha256(config.weights), world.device)


def _extract(
    extractor: Extractor, batches: Callable[[int], Iterator[PixelBatch]], size: int
) -> tuple[Features, Features]:
    pairs = [extractor.extract(batch) for batch in batches(size)]
    return np.concatenate([pair[0] for pair in pairs]), np.concatenate([pair[1] for pair in pairs])


def _unit_path(folder: Path, name: str, unit: int) -> Path:
    return folder / f"{name}-{unit:05d}.npz"


@dataclass(frozen=True)
class Reference:
    """Features of the training images, summarised: those of all images may not fit in memory."""

    stats: FeatureStats
    compared: Features
    """Features of the images that precision and recall use."""

    @classmethod
    def collect(cls, folder: Path, images: ImageSet, limit: int) -> Reference:
        """Statistics of all images, and the features of at most `limit` evenly spread ones."""
        count = len(images.rows)
        chosen = np.linspace(0, count - 1, min(count, limit)).astype(np.int64)

        def features() -> Iterator[Features]:
            return (_finished(folder, "reference", unit)["features"] for unit in range(images.num_units))

        stats = reduce(FeatureStats.merge, map(FeatureStats.of, features()))
        compared = [part[chosen[chosen // _UNIT == unit] % _UNIT] for unit, part in enumerate(features())]
        return cls(stats, np.concatenate(compared))


def _collect_sets(folder: Path, sets: dict[str, ImageSet], extractor: Extractor, compared: int) -> FeatureSets:
    """Features of all sets from their finished units, those of the reference summarised."""
    reference = Reference.collect(folder, sets["reference"], compared)
    found = {name: _collected(folder, name, images) for name, images in sets.items() if name != "reference"}
    return FeatureSets(
        extractor=ExtractorInfo(
            name=extractor.name,
            weights_sha256=extractor.sha256,
            fid_inception=extractor.sha256 == INCEPTION_SHA256,
            input_size=extractor.input_size,
        ),
        features={name: arrays["features"] for name, arrays in found.items()},
        samples_logits=found["samples"]["logits"],
        reference=reference.stats,
        compared=reference.compared,
    )


def _collected(folder: Path, name: str, images: ImageSet) -> dict[str, Features]:
    parts = [_finished(folder, name, unit) for unit in range(images.num_units)]
    return {field: np.concatenate([part[field] for part in parts]) for field in ("features", "logits")}


def _load(folder: Path, name: str, unit: int) -> dict[str, Features] | None:
    """Features and logits of a unit; None if the file is missing or damaged."""
    return read_arrays(_unit_path(folder, name, unit))


def _finished(folder: Path, name: str, unit: int) -> dict[str, Features]:
    arrays = _load(folder, name, unit)
    assert arrays is not None  # this run wrote the file or found it whole
    return arrays


if __name__ == "__main__":
    main(evaluate, EvaluateConfig)
