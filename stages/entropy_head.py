"""Stage `entropy_head`: boundary sources that replace the entropy model at sampling time.

One source is a head that predicts the stored entropies from the encoder states of the finished, frozen model. It is
trained here, unless it was trained jointly with the model. The other source is the entropy of the model's own
predictions. Each source gets the threshold that gives the patch index's mean length on training images. The entropy
model's threshold does not apply, because a regression shrinks towards the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from conf.boundary_sources import BOUNDARY_SOURCES
from conf.entropy_head import EntropyHeadConfig
from conf.runtime import RuntimeConfig
from models.config import EntropyHeadConfig as HeadShape
from models.dpar import DPAR
from models.entropy_head import EntropyHead
from models.packed_linear import pack_linear_layers
from models.patching import PatchRule
from stages.families import load_model
from stages.patches.boundary_sources import CALIBRATIONS, KnownImages
from stages.patches.calibration import HELDOUT_FILE, SourceEntropies, Thresholds
from stages.patches.rule import SavedRule
from stages.patches.thresholds import EntropySample
from stages.runtime.arrays import Entropies, Indices
from stages.runtime.distributed import World, process_group
from stages.runtime.job import Inputs, main
from stages.runtime.randomness import Purpose, seed_torch
from stages.runtime.transfer import to_device
from stages.stores.entropies import EntropyStore
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenStore
from stages.training.entropies import EntropyData, HeadObjective
from stages.training.loop import train_model
from stages.weights.own import HEAD_FILE, load_head, save_head

_HELDOUT = 4096  # largest number of held-out images on which sources are evaluated


def entropy_head(config: EntropyHeadConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write the head's weights and `thresholds.json` with the threshold of each source.

    `entropies.npz` holds each source's entropies of some training views, from which other thresholds can be found.
    `heldout.npz` holds those of the first view of the first held-out images. A model without patches, or with static
    ones, has no source of its own and gets no thresholds.
    """
    with process_group(runtime) as world:
        loaded = load_model(inputs["train"], world.device)
        model = loaded if isinstance(loaded, DPAR) and SavedRule.of(inputs).mode != "static" else None
        head = None if model is None else _head(config, inputs, model, output, world, runtime)
    if not world.is_main:
        return
    if model is None:
        Thresholds({}).save(output)
        return
    if head is not None:
        save_head(output, head)
    _calibrate(Sources.of(config, inputs, model, head, world.device), config, output)


def _head(
    config: EntropyHeadConfig, inputs: Inputs, model: DPAR, output: Path, world: World, runtime: RuntimeConfig
) -> EntropyHead | None:
    """The head trained jointly with the model, else a newly trained one; None if the settings want no head."""
    if (inputs["train"] / HEAD_FILE).exists():
        return load_head(inputs["train"], world.device)
    if config.kind == "none":
        return None
    store = TokenStore.of(inputs)
    data = EntropyData(store, PatchIndex.of(inputs, store), EntropyStore.of(inputs))
    seed_torch(config.seed, Purpose.WEIGHTS)
    head = EntropyHead(HeadShape.of(model.config, config.kind))
    run = data.training(head, HeadObjective(model, head), config.training, config.seed, world)
    train_model(run, output, world, runtime)
    return head.eval()


@dataclass(frozen=True)
class Sources:
    """The model's own boundary sources, and the images on which they are evaluated."""

    model: DPAR
    head: EntropyHead | None
    store: TokenStore
    index: PatchIndex
    rule: PatchRule
    mean_length: float
    """Mean patch length of the patch index on training images, the target for every source."""
    batch_size: int
    device: torch.device

    @classmethod
    def of(
        cls,
        config: EntropyHeadConfig,
        inputs: Inputs,
        model: DPAR,
        head: EntropyHead | None,
        device: torch.device,
    ) -> Sources:
        """Load the sources from finished artifacts."""
        saved, store = SavedRule.of(inputs), TokenStore.of(inputs)
        return cls(
            model=model,
            head=head,
            store=store,
            index=PatchIndex.of(inputs, store),
            rule=saved.patch_rule(store.grid),
            mean_length=saved.mean_length,
            batch_size=config.batch_size,
            device=device,
        )

    @torch.inference_mode()
    def entropies(self, source: str, images: Indices, views: Indices) -> Entropies:
        """Entropies of the given images and views by one source, nats."""
        parts = [np.empty((0, self.store.num_tokens), np.float32)]
        for first in range(0, len(images), self.batch_size):
            rows, of_view = images[first : first + self.batch_size], views[first : first + self.batch_size]
            tokens = to_device(torch.from_numpy(self.store.fetch(rows, of_view).astype(np.int64)), self.device)
            labels = to_device(torch.from_numpy(self.store.labels[rows].astype(np.int64)), self.device)
            images_here = KnownImages(tokens, labels, torch.from_numpy(self.index.starts(rows, of_view)))
            parts.append(CALIBRATIONS[source].entropies(self.model, self.head, images_here).cpu().numpy())
        return np.concatenate(parts)


def _calibrate(sources: Sources, config: EntropyHeadConfig, output: Path) -> None:
    """Find each source's threshold on training views, and evaluate the source on held-out images."""
    limits = {
        source: calibration.limit(config)
        for source, calibration in CALIBRATIONS.items()
        if sources.head is not None or "head" not in BOUNDARY_SOURCES[source].needs
    }
    pack_linear_layers(sources.model)
    store, thresholds = sources.store, dict[str, float]()
    calibrated, heldout = dict[str, Entropies](), dict[str, Entropies]()
    for source, limit in limits.items():
        total = store.num_train * store.num_views
        rows = np.linspace(0, total - 1, min(total, limit)).astype(np.int64)
        calibrated[source] = sources.entropies(source, rows % store.num_train, rows // store.num_train)
        sample = EntropySample.of_array(calibrated[source], store.codebook_size)
        thresholds[source] = sample.find_threshold(sources.mean_length, sources.rule, "patch_index")
        images = np.arange(store.num_train, len(store))[: min(limit, _HELDOUT)]
        heldout[source] = sources.entropies(source, images, np.zeros_like(images))
    SourceEntropies(calibrated).save(output)
    SourceEntropies(heldout).save(output, HELDOUT_FILE)
    Thresholds(thresholds).save(output)


if __name__ == "__main__":
    main(entropy_head, EntropyHeadConfig)
