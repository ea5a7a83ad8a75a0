"""Stage `entropy_head`: what decides where patches start without the entropy model.

A head is trained to read the stored entropies off the encoder of the finished model, which is not changed by it, unless
one was trained with the model. The model's own uncertainty is another source. Each gets the threshold that gives the
patch index's mean length on training images: regression shrinks towards the mean, so the entropy model's threshold does
not carry over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conf.model_stages import EntropyHeadConfig
from conf.schema import RuntimeConfig
from models.boundaries import GivenBoundaries, NextToken
from models.config import EntropyHeadConfig as HeadShape
from models.dpar import DPAR
from models.entropy_head import EntropyHead, entropies_of
from models.gpt import token_entropy
from models.packed_linear import pack_linear_layers
from models.patch_tables import PatchTables, unpack_bits
from models.patching import PatchRule
from models.sampling import sample_dpar
from models.token_sampling import SamplingOptions
from models.vq import VQModel
from stages.artifact import read_json, write_atomic, write_json
from stages.boundaries import SAMPLES, THRESHOLDS, patch_rule
from stages.distributed import World, process_group
from stages.images import float_to_pixels
from stages.job import Inputs, main
from stages.pictures import captioned_grid, patches_outlined
from stages.stores.blocks import Integers
from stages.stores.entropies import EntropyStore
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenStore
from stages.thresholds import EntropySample
from stages.training.entropies import EntropyData, HeadObjective
from stages.training.loop import train_model
from stages.weights import HEAD_FILE, load_head, load_model, load_vq, save_head

Entropies = NDArray[np.float32]
Starts = NDArray[np.bool_]
_SHOWN = 6  # held-out images in the picture
_HELDOUT = 4096  # held-out images that sources are judged by, at most


def entropy_head(config: EntropyHeadConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write the head's weights, `thresholds.json` with the threshold of each source, and `sources.png`.

    `entropies.npz` has what each source says of some training views, from which other thresholds can be found, and
    `metrics.json` how near it comes to the entropy model on held-out images. A rival, or a model on static patches, has
    no such source: then there is no threshold.
    """
    with process_group(runtime) as world:
        model = load_model(inputs["train"], world.device)
        if not isinstance(model, DPAR) or read_json(inputs["patch_index"] / "rule.json")["mode"] == "static":
            if world.is_main:
                write_json(output / THRESHOLDS, {})
                write_json(output / "metrics.json", {})
            return
        head = _head(config, inputs, model, output, world)
        if world.is_main:
            if head is not None:
                save_head(output, head)
            _calibrate(Sources.of(config, inputs, model, head, world.device), config, output)


def _head(config: EntropyHeadConfig, inputs: Inputs, model: DPAR, output: Path, world: World) -> EntropyHead | None:
    """The head that was trained with the model, or else a new one, or none."""
    if (inputs["train"] / HEAD_FILE).exists():
        return load_head(inputs["train"], world.device)
    if config.kind == "none":
        return None
    store = TokenStore.open(inputs["tokenize"] / "tokens.zarr")
    index = PatchIndex.open(inputs["patch_index"] / "patches.parquet", store.digest)
    entropies = EntropyStore.open(inputs["entropy_map"] / "entropies.zarr")
    return _train(config, model, EntropyData(store, index, entropies), output, world)


def _train(config: EntropyHeadConfig, model: DPAR, data: EntropyData, output: Path, world: World) -> EntropyHead:
    assert config.kind != "none"
    torch.manual_seed(config.seed)
    head = EntropyHead(HeadShape.of(model.config, config.kind))
    train_model(data.training(head, HeadObjective(model, head), config.training, config.seed, world), output, world)
    return head.eval()


@dataclass(frozen=True)
class Sources:
    """The model's own sources of boundaries, and the images they are asked about."""

    model: DPAR
    head: EntropyHead | None
    store: TokenStore
    entropies: EntropyStore
    index: PatchIndex
    rule: PatchRule
    mean_length: float
    """Of the patch index, on training images: what every source is brought to."""
    batch_size: int
    device: torch.device
    vq: VQModel

    @classmethod
    def of(
        cls,
        config: EntropyHeadConfig,
        inputs: Inputs,
        model: DPAR,
        head: EntropyHead | None,
        device: torch.device,
    ) -> Sources:
        """From finished artifacts."""
        saved = read_json(inputs["patch_index"] / "rule.json")
        store = TokenStore.open(inputs["tokenize"] / "tokens.zarr")
        return cls(
            model=model,
            head=head,
            store=store,
            entropies=EntropyStore.open(inputs["entropy_map"] / "entropies.zarr"),
            index=PatchIndex.open(inputs["patch_index"] / "patches.parquet", store.digest),
            rule=patch_rule(saved, store.grid),
            mean_length=saved["mean_length"],
            batch_size=config.batch_size,
            device=device,
            vq=load_vq(inputs["tokenizer"], device),
        )

    @torch.inference_mode()
    def ask(self, source: str, images: Integers, views: Integers) -> Entropies:
        """Entropies (n, T) of the given images and views, nats."""
        parts = []
        for first in range(0, len(images), self.batch_size):
            rows, of_view = images[first : first + self.batch_size], views[first : first + self.batch_size]
            tokens = torch.from_numpy(self.store.fetch(rows, of_view).astype(np.int64)).to(self.device)
            if source == "entropy_head":
                assert self.head is not None
                found = entropies_of(self.model, self.head, tokens)
            else:
                labels = torch.from_numpy(self.store.labels[rows].astype(np.int64)).to(self.device)
                found = own_entropies(self.model, tokens, labels, torch.from_numpy(self.index.starts(rows, of_view)))
            parts.append(found.cpu().numpy())
        return np.concatenate(parts)

    def starts(self, entropies: Entropies, threshold: float) -> Starts:
        """Where the rule opens patches at a threshold."""
        tables = PatchTables.of(replace(self.rule, threshold=threshold), self.store.num_tokens)
        return unpack_bits(tables.packed_starts(entropies), self.store.num_tokens)


class _Recorded:
    """Given boundaries, while the model's own entropies are written down."""

    def __init__(self, starts: Tensor) -> None:
        self._given, self.entropies = GivenBoundaries(starts), list[Tensor]()

    def begin(self, batch: int, num_tokens: int) -> None:
        """Start a batch of images."""
        self._given.begin(batch, num_tokens)

    def opens(self, token: NextToken) -> Tensor:
        """The given answer."""
        self.entropies.append(token_entropy(token.open_logits()))
        return self._given.opens(token)


def own_entropies(model: DPAR, tokens: Tensor, labels: Tensor, starts: Tensor) -> Tensor:
    """Entropies (B, T) of the model's own predictions of known tokens, each as if it opened no patch, nats."""
    recorded = _Recorded(starts.to(tokens.device))
    uniforms = torch.zeros(tokens.shape, device=tokens.device)
    sample_dpar(model, labels, uniforms, SamplingOptions(), recorded, prefix=tokens)
    first = torch.full_like(recorded.entropies[0], math.log(model.config.codebook_size))
    return torch.stack([first, *recorded.entropies], dim=1)


def _calibrate(sources: Sources, config: EntropyHeadConfig, output: Path) -> None:
    """Find each source's threshold on training views, and hold it against the entropy model on held-out images."""
    limits = {"own_entropy": config.own_entropy_on}
    if sources.head is not None:
        limits = {"entropy_head": config.calibrated_on, **limits}
    pack_linear_layers(sources.model)
    store, thresholds, asked = sources.store, dict[str, float](), dict[str, Entropies]()
    shown = {"entropy model": sources.index.starts(*_shown_images(store))}
    metrics: dict[str, float] = {}
    for source, limit in limits.items():
        total = store.num_train * store.num_views
        rows = np.linspace(0, total - 1, min(total, limit)).astype(np.int64)
        asked[source] = sources.ask(source, rows % store.num_train, rows // store.num_train)
        sample = EntropySample.of_array(asked[source], store.codebook_size)
        thresholds[source] = sample.find_threshold(sources.mean_length, sources.rule, "patch_index")
        metrics |= {
            f"{source}_threshold": thresholds[source],
            f"{source}_mean_length": sample.mean_length(replace(sources.rule, threshold=thresholds[source])),
            **_nearness(sources, source, thresholds[source], limit),
        }
        shown[source.replace("_", " ")] = sources.starts(sources.ask(source, *_shown_images(store)), thresholds[source])
    write_atomic(output / SAMPLES, lambda file: np.savez(file, allow_pickle=False, **asked))
    write_json(output / THRESHOLDS, thresholds)
    write_json(output / "metrics.json", metrics)
    _draw(sources, shown, output / "sources.png")


def _nearness(sources: Sources, source: str, threshold: float, limit: int) -> dict[str, float]:
    """Correlation with the entropy model's entropies on held-out images, and share of tokens with the same answer."""
    store = sources.store
    images = np.arange(store.num_train, len(store))[: min(limit, _HELDOUT)]
    if not len(images):
        return {}
    views = np.zeros_like(images)
    found, wanted = sources.ask(source, images, views), sources.entropies.fetch(images, views)
    same = sources.starts(found, threshold) == sources.index.starts(images, views)
    correlation = np.corrcoef(found[:, 1:].ravel(), wanted[:, 1:].ravel())[0, 1]
    return {f"{source}_correlation": float(correlation), f"{source}_agreement": float(same.mean())}


def _shown_images(store: TokenStore) -> tuple[Integers, Integers]:
    """Evenly spread images, held-out ones where there are any, in their first view."""
    first = store.num_train if store.num_train < len(store) else 0
    images = np.unique(np.linspace(first, len(store) - 1, _SHOWN).astype(np.int64))
    return images, np.zeros_like(images)


def _draw(sources: Sources, shown: dict[str, Starts], path: Path) -> None:
    """A row of the same images for each source, cut as it cuts them."""
    tokens = torch.from_numpy(sources.store.fetch(*_shown_images(sources.store)).astype(np.int64))
    with torch.inference_mode():
        images = float_to_pixels(sources.vq.decode(tokens.to(sources.device)))
    pictures, captions = [], []
    for source, starts in shown.items():
        for image, here in zip(images, starts, strict=True):
            pictures.append(patches_outlined(image, here, sources.store.grid))
            captions.append(f"{source}: {int(here.sum())} patches")
    picture = captioned_grid(pictures, captions, len(images))
    write_atomic(path, lambda file: picture.save(file, "PNG"))


if __name__ == "__main__":
    main(entropy_head, EntropyHeadConfig)
