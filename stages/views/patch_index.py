"""View of stage `patch_index`: patch lengths, token entropies, and real images cut into patches."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from conf.patch_index import PatchIndexConfig
from conf.runtime import RuntimeConfig
from stages.images.decode import center_crop, decode
from stages.patches.rule import SavedRule
from stages.runtime.artifact import write_json
from stages.runtime.job import Inputs, main
from stages.stores.entropies import EntropyStore
from stages.stores.image_index import ImageIndex
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenStore
from stages.views.patch_figures import PatchHistograms
from stages.views.pictures import patch_picture, save_png

_SAMPLED = 65_536  # largest number of views in the histograms
_BLOCK = 4096  # views read at a time
_ROWS = 8  # images in the picture


def patch_index(config: PatchIndexConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `metrics.json`, `histograms.png`, and `patches.png` with real images cut into patches."""
    store = TokenStore.of(inputs)
    index = PatchIndex.of(inputs, store)
    threshold = SavedRule.of(inputs).threshold
    entropies = EntropyStore.of(inputs) if "entropy_map" in inputs else None
    numbers = patch_numbers(store, index)
    write_json(output / "metrics.json", numbers if threshold is None else numbers | {"threshold": threshold})
    _histograms(store, index, entropies).draw(threshold, output / "histograms.png")
    if "images" in inputs and "dataset" in inputs:
        _picture(inputs, store, index, entropies, output / "patches.png")


def patch_numbers(store: TokenStore, index: PatchIndex) -> dict[str, float]:
    """Mean patch length of training and held-out images over all views, and patches per training image."""
    counts = index.patch_counts()  # (N, A)
    training, heldout = counts[: store.num_train], counts[store.num_train :]
    numbers = {
        "mean_length": store.num_tokens / float(training.mean()),
        "patches_per_image": float(training.mean()),
    }
    if heldout.size:
        numbers["heldout_mean_length"] = store.num_tokens / float(heldout.mean())
    return numbers


def _histograms(store: TokenStore, index: PatchIndex, entropies: EntropyStore | None) -> PatchHistograms:
    """Histograms of all training views, or of _SAMPLED evenly spread ones."""
    total = store.num_train * store.num_views
    rows = np.linspace(0, total - 1, min(total, _SAMPLED)).astype(np.int64)
    histograms = PatchHistograms(store.num_tokens, math.log(store.codebook_size))
    for first in range(0, len(rows), _BLOCK):
        images, views = rows[first : first + _BLOCK] % store.num_train, rows[first : first + _BLOCK] // store.num_train
        histograms.add(index.starts(images, views), None if entropies is None else entropies.fetch(images, views))
    return histograms


def _picture(inputs: Inputs, store: TokenStore, index: PatchIndex, entropies: EntropyStore | None, path: Path) -> None:
    """Picture of real images with their patches and entropies: at most one per class, held-out images first."""
    rows = _spread_rows(store)
    views = np.zeros_like(rows)
    files = ImageIndex.of(inputs)
    size = store.facts.image_size
    images = np.stack([center_crop(decode(files.read(inputs["images"], int(row))), size) for row in rows])
    heat = None if entropies is None else entropies.fetch(rows, views)
    save_png(patch_picture(images, index.starts(rows, views), heat, store.grid), path)


def _spread_rows(store: TokenStore) -> npt.NDArray[np.int64]:
    newest_first = np.arange(len(store))[::-1]  # held-out images have the highest numbers
    _, places = np.unique(store.labels[newest_first], return_index=True)
    return newest_first[places][:_ROWS]


if __name__ == "__main__":
    main(patch_index, PatchIndexConfig)
