"""View of stage `entropy_head`: agreement of each boundary source with the entropy model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from conf.boundary_sources import BOUNDARY_SOURCES
from conf.entropy_head import EntropyHeadConfig
from conf.runtime import RuntimeConfig
from models.patch_tables import PatchTables, unpack_bits
from models.patching import PatchRule
from stages.images.tensors import float_to_pixels
from stages.patches.calibration import HELDOUT_FILE, SourceEntropies, Thresholds
from stages.patches.rule import SavedRule
from stages.patches.thresholds import EntropySample
from stages.runtime.arrays import Entropies, Indices, Starts
from stages.runtime.artifact import write_json
from stages.runtime.job import Inputs, main
from stages.stores.entropies import EntropyStore
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenStore
from stages.views.pictures import captioned_grid, patches_outlined, save_png
from stages.weights.own import load_vq

_SHOWN = 6  # images in the picture


def entropy_head(config: EntropyHeadConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `metrics.json`, and `sources.png` with the same images cut into patches by each source."""
    thresholds = Thresholds.of(inputs).by_source
    if not thresholds:
        write_json(output / "metrics.json", {})
        return
    found = Found.of(inputs)
    metrics: dict[str, float] = {}
    for source, threshold in thresholds.items():
        metrics |= {f"{source}_{name}": value for name, value in found.numbers(source, threshold).items()}
    write_json(output / "metrics.json", metrics)
    if "tokenizer" in inputs:
        _picture(inputs, found, thresholds, output / "sources.png")


@dataclass(frozen=True)
class Found:
    """Entropies of the sources, and the entropy model's entropies of the same images."""

    store: TokenStore
    index: PatchIndex
    entropies: EntropyStore
    rule: PatchRule
    calibrated: Mapping[str, Entropies]
    """Entropies of training views, by source."""
    heldout: Mapping[str, Entropies]
    """Entropies of the first view of the first held-out images, by source."""

    @classmethod
    def of(cls, inputs: Inputs) -> Found:
        """Read the finished artifacts."""
        store = TokenStore.of(inputs)
        return cls(
            store=store,
            index=PatchIndex.of(inputs, store),
            entropies=EntropyStore.of(inputs),
            rule=SavedRule.of(inputs).patch_rule(store.grid),
            calibrated=SourceEntropies.of(inputs).by_source,
            heldout=SourceEntropies.of(inputs, HELDOUT_FILE).by_source,
        )

    def numbers(self, source: str, threshold: float) -> dict[str, float]:
        """Metrics of a source: threshold and mean length on training views; on held-out images, two more.

        They compare the source with the entropy model. `correlation` is the Pearson correlation of the entropies.
        `agreement` is the share of tokens on which both open a patch or both do not.
        """
        sample = EntropySample.of_array(self.calibrated[source], self.store.codebook_size)
        mean_length = sample.mean_length(replace(self.rule, threshold=threshold))
        numbers = {"threshold": threshold, "mean_length": mean_length}
        predicted = self.heldout[source]
        if not len(predicted):
            return numbers
        images, views = self._heldout_images(len(predicted))
        wanted = self.entropies.fetch(images, views)
        same = self.starts(predicted, threshold) == self.index.starts(images, views)
        correlation = np.corrcoef(predicted[:, 1:].ravel(), wanted[:, 1:].ravel())[0, 1]
        return numbers | {"correlation": float(correlation), "agreement": float(same.mean())}

    def starts(self, entropies: Entropies, threshold: float) -> Starts:
        """Patch starts by the rule at a threshold."""
        tables = PatchTables.of(replace(self.rule, threshold=threshold), self.store.num_tokens)
        return unpack_bits(tables.packed_starts(entropies), self.store.num_tokens)

    def shown(self) -> tuple[Indices, Indices, dict[str, Entropies]]:
        """A few evenly spread images with their views, and each source's entropies of them.

        They are held-out images, or training images if none are held out. Every source has entropies of them.
        """
        count = min(map(len, self.heldout.values()))
        if count:
            rows = np.unique(np.linspace(0, count - 1, _SHOWN).astype(np.int64))
            images, views = self._heldout_images(count)
            return images[rows], views[rows], {source: values[rows] for source, values in self.heldout.items()}
        # Sources are evaluated on evenly spread training views, which always include the first and the last one.
        total = self.store.num_train * self.store.num_views
        ends = np.unique([0, total - 1])
        entropies = {source: values[[0, -1][: len(ends)]] for source, values in self.calibrated.items()}
        return ends % self.store.num_train, ends // self.store.num_train, entropies

    def _heldout_images(self, count: int) -> tuple[Indices, Indices]:
        images = np.arange(self.store.num_train, self.store.num_train + count)
        return images, np.zeros_like(images)


def _picture(inputs: Inputs, found: Found, thresholds: Mapping[str, float], path: Path) -> None:
    """One row per source with the same images, cut into its patches. The entropy model's row comes first."""
    images, views, entropies = found.shown()
    tokens = torch.from_numpy(found.store.fetch(images, views).astype(np.int64))
    with torch.inference_mode():
        decoded = float_to_pixels(load_vq(inputs["tokenizer"]).decode(tokens))
    rows = {BOUNDARY_SOURCES["entropy_model"].label: found.index.starts(images, views)}
    for source, info in BOUNDARY_SOURCES.items():
        if source in entropies:
            rows[info.label] = found.starts(entropies[source], thresholds[source])
    pictures, captions = [], []
    for label, starts in rows.items():
        for image, here in zip(decoded, starts, strict=True):
            pictures.append(patches_outlined(image, here, found.store.grid))
            captions.append(f"{label}: {int(here.sum())} patches")
    save_png(captioned_grid(pictures, captions, len(images)), path)


if __name__ == "__main__":
    main(entropy_head, EntropyHeadConfig)
