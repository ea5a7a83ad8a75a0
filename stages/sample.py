"""Stage `sample`: images drawn from the class-conditional model, with patch boundaries decided while drawing.

A sample is a function of (seed, sample number): its class and the uniform number behind each of its tokens come from
counters, so batch size, process count and resume point do not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from conf.schema import RuntimeConfig, SampleConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.patching import PatchRule, static_patch_starts
from models.sampling import (
    Boundaries,
    EntropyBoundaries,
    GivenBoundaries,
    SamplingOptions,
    sample_dpar,
    sample_gpt,
)
from models.vq import VQModel
from stages.artifact import read_json, write_json
from stages.distributed import World, barrier, process_group
from stages.images import center_crop, decode, float_to_pixels
from stages.job import Inputs, main
from stages.pictures import patch_picture, sample_grid
from stages.progress import Progress
from stages.stores.entropies import EntropyStore
from stages.stores.files import ImageIndex
from stages.stores.patches import PatchIndex
from stages.stores.samples import SampleFacts, SampleStore, sample_writer
from stages.stores.tokens import TokenStore
from stages.weights import load_gpt, load_model, load_vq

_PICTURE_ROWS = 8
_LABEL_STREAM, _TOKEN_STREAM = 0, 1


def sample(config: SampleConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `samples.zarr`, `grid.png`, `patches.png` and the samples' mean patch length."""
    with process_group(runtime) as world:
        store = TokenStore.open(inputs["tokenize"] / "tokens.zarr")
        drawer = Drawer.load(config, inputs, store, world)
        facts = SampleFacts(
            num_samples=config.num_samples,
            num_classes=store.num_classes,
            num_tokens=store.num_tokens,
            grid=store.grid,
            codebook_size=store.codebook_size,
            image_size=config.image_size,
            chunk_rows=config.batch_size,
        )
        writer = sample_writer(output / "samples.zarr", facts)
        labels = draw_labels(config, store.labels[: store.num_train], store.num_classes)
        units = writer.pending(world.rank, world.size)
        progress = Progress(output, "batches", len(units), enabled=world.is_main)
        for done, unit in enumerate(units, 1):
            numbers = np.arange(config.num_samples)[writer.spec.rows(unit)]
            writer.write(unit, **drawer.draw(numbers, labels[numbers]))
            progress.update(done, f"{done * config.batch_size * world.size} images")
        barrier()
        if world.is_main:
            writer.finish()
            _summarise(config, inputs, output, store)


@dataclass(frozen=True)
class Drawer:
    """Everything a batch of samples is drawn with."""

    config: SampleConfig
    model: GPT | DPAR
    vq: VQModel
    boundaries: Boundaries | None
    device: torch.device

    @classmethod
    def load(cls, config: SampleConfig, inputs: Inputs, store: TokenStore, world: World) -> Drawer:
        """Load the finished models that `inputs` names; the entropy model only where it decides boundaries."""
        model = load_model(inputs["train"], world.device)
        boundaries = _boundaries(config, inputs, store, world.device) if isinstance(model, DPAR) else None
        return cls(config, model, load_vq(inputs["tokenizer"], world.device), boundaries, world.device)

    @torch.inference_mode()
    def draw(self, numbers: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.generic]]:
        """Rows of the sample store: tokens, where patches start, decoded images."""
        options = SamplingOptions(
            cfg_scale=self.config.cfg_scale,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
        )
        classes = torch.from_numpy(labels).to(self.device)
        uniforms = self._uniforms(numbers).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            if self.boundaries is None:
                assert isinstance(self.model, GPT)
                tokens = sample_gpt(self.model, classes, uniforms, options)
                starts = torch.ones_like(tokens, dtype=torch.bool)
            else:
                assert isinstance(self.model, DPAR)
                tokens, starts = sample_dpar(self.model, classes, uniforms, options, self.boundaries)
        images = float_to_pixels(resize(self.vq.decode(tokens), self.config.image_size))
        return {
            "images": images,
            "labels": labels.astype(np.uint16),
            "tokens": tokens.cpu().numpy().astype(np.uint16),
            "patch_starts": starts.cpu().numpy(),
        }

    def _uniforms(self, numbers: npt.NDArray[np.int64]) -> Float[Tensor, "B T"]:
        """One number in [0, 1) for each (sample, position), from the sample's own counter-based stream."""
        rows = [_stream(self.config.seed, _TOKEN_STREAM, int(number)).random(self._num_tokens) for number in numbers]
        return torch.from_numpy(np.stack(rows).astype(np.float32)).clamp_(max=1 - 2**-24)

    @property
    def _num_tokens(self) -> int:
        return self.model.config.num_tokens


def draw_labels(
    config: SampleConfig, training_labels: npt.NDArray[np.uint16], num_classes: int
) -> npt.NDArray[np.int64]:
    """Class of every sample.

    "uniform" draws each on its own, as LlamaGen and ADM do. "balanced" and "data" fix the counts (equal, or the
    training images' shares, by largest remainder) and shuffle, so that any part of the samples is about as mixed.
    """
    generator = _stream(config.seed, _LABEL_STREAM, 0)
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


def resize(images: Float[Tensor, "B 3 h w"], size: int) -> Float[Tensor, "B 3 H W"]:
    """Decoded images at the evaluation size: bicubic without antialiasing on floats, as LlamaGen evaluates 384 px."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images.float(), size=(size, size), mode="bicubic")


def _boundaries(config: SampleConfig, inputs: Inputs, store: TokenStore, device: torch.device) -> Boundaries:
    """What opens patches while drawing: the rule of the patch index, unless the settings name other numbers."""
    rule = read_json(inputs["patch_index"] / "rule.json")
    if rule["mode"] == "static":
        return GivenBoundaries(static_patch_starts(rule["static_length"], store.num_tokens).to(device))
    return EntropyBoundaries(
        load_gpt(inputs["entropy_model"], device),
        PatchRule(
            threshold=rule["threshold"] if config.threshold is None else config.threshold,
            max_length=rule["max_length"] if config.max_length is None else config.max_length,
            row_boundary=rule["row_boundary"],
            grid=store.grid,
        ),
    )


def _summarise(config: SampleConfig, inputs: Inputs, output: Path, store: TokenStore) -> None:
    """The two pictures, and the numbers of the samples."""
    samples = SampleStore.open(output / "samples.zarr")
    index = ImageIndex.open(inputs["dataset"])
    chosen = np.concatenate(
        [np.flatnonzero(samples.labels == label)[: config.grid_columns] for label in range(store.num_classes)]
    )
    grid = sample_grid(samples.images(chosen), samples.labels[chosen], index.classes, config.grid_columns)
    grid.save(output / "grid.png")
    _real_patches(inputs, store, index).save(output / "patches.png")
    write_json(
        output / "metrics.json",
        {
            "num_samples": config.num_samples,
            "sample_mean_patch_length": store.num_tokens / samples.patch_starts.sum(axis=1).mean(),
        },
    )


def _real_patches(inputs: Inputs, store: TokenStore, index: ImageIndex) -> Image.Image:
    """Real images, at most one a class and held-out ones first, with their patches and entropies."""
    newest_first = np.arange(len(store))[::-1]  # held-out images have the highest numbers
    _, places = np.unique(store.labels[newest_first], return_index=True)
    rows = newest_first[places][:_PICTURE_ROWS]
    views = np.zeros_like(rows)
    entropies = EntropyStore.open(inputs["entropy_map"] / "entropies.zarr").fetch(rows, views)
    starts = PatchIndex.open(inputs["patch_index"] / "patches.parquet", store.digest).starts(rows, views)
    size = store.facts.image_size
    images = np.stack([center_crop(decode(index.read(inputs["images"], int(row))), size) for row in rows])
    return patch_picture(images, starts, entropies, store.grid)


def _stream(seed: int, purpose: int, number: int) -> np.random.Generator:
    """A generator of its own for each (seed, purpose, number)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose << 56 | number], dtype=np.uint64)))


if __name__ == "__main__":
    main(sample, SampleConfig)
