"""View of stage `entropy_map`: mean entropies."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from conf.entropy_map import EntropyMapConfig
from conf.runtime import RuntimeConfig
from stages.runtime.artifact import write_json
from stages.runtime.job import Inputs, main
from stages.stores.entropies import EntropyStore


def entropy_map(config: EntropyMapConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `metrics.json`: mean entropy in nats of training and held-out images."""
    write_json(output / "metrics.json", mean_entropies(EntropyStore.of(inputs)))


def mean_entropies(store: EntropyStore) -> dict[str, float]:
    """Mean entropy in nats of training and held-out images, without the first token, which has no prediction."""
    sums = {"mean_entropy": 0.0, "heldout_mean_entropy": 0.0}
    for unit in range(store.num_units):
        first = store.rows(unit).start
        cut = min(max(store.num_train - first, 0), store.rows(unit).stop - first)
        for view in range(store.num_views):
            block = store.read_block(unit, view)[:, 1:]
            sums["mean_entropy"] += float(block[:cut].sum(dtype=np.float64))
            sums["heldout_mean_entropy"] += float(block[cut:].sum(dtype=np.float64))
    images = {"mean_entropy": store.num_train, "heldout_mean_entropy": store.num_images - store.num_train}
    per_image = store.num_views * (store.num_tokens - 1)
    return {name: sums[name] / (count * per_image) for name, count in images.items() if count}


if __name__ == "__main__":
    main(entropy_map, EntropyMapConfig)
