"""View of stage `sample`: a grid of samples, and the mean patch length."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt

from conf.boundary_sources import BOUNDARY_SOURCES
from conf.runtime import RuntimeConfig
from conf.sample import SampleConfig
from stages.patches.boundary_sources import SOURCES, EntropySource
from stages.runtime.artifact import read_json, write_json
from stages.runtime.job import Inputs, main
from stages.stores.image_index import CLASSES_FILE
from stages.stores.samples import SampleStore
from stages.views.pictures import sample_grid, save_png

logger = logging.getLogger(__name__)
_GRID_CLASSES = 20  # largest number of rows in the grid


def sample(config: SampleConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `metrics.json`, and `grid.png` with a row of samples for each class, or for some evenly spread classes."""
    samples = SampleStore.of(inputs)
    numbers = {
        "num_samples": len(samples),
        "sample_mean_patch_length": samples.facts.num_tokens / float(samples.patch_starts.sum(axis=1).mean()),
    }
    write_json(output / "metrics.json", numbers | _threshold(inputs))
    classes: list[str] = read_json(inputs["tokenize"] / CLASSES_FILE)
    rows = {
        classes[label]: samples.images(np.flatnonzero(samples.labels == label)[: config.grid_columns])
        for label in shown_classes(len(classes))
    }
    save_png(sample_grid(rows, samples.facts.image_size, config.grid_columns), output / "grid.png")


def shown_classes(num_classes: int) -> npt.NDArray[np.int64]:
    """Classes shown in the grid: all, or _GRID_CLASSES evenly spread ones."""
    return np.linspace(0, num_classes - 1, min(num_classes, _GRID_CLASSES)).astype(np.int64)


def _threshold(inputs: Inputs) -> dict[str, float]:
    """Threshold of the boundary source, if it has one, and the share of the training images' entropies above it.

    A threshold below or above all entropies is allowed for ablations, and gives a warning.
    """
    rule = read_json(inputs["sample"] / "boundaries.json")
    if "threshold" not in rule:
        return {}
    source = SOURCES[rule["source"]]
    assert isinstance(source, EntropySource)  # no other source has a threshold
    if not BOUNDARY_SOURCES[rule["source"]].reads_for_target <= inputs.keys():  # its entropies are not cached any more
        return {"threshold": rule["threshold"]}
    share = source.entropies(inputs).share_above(rule["threshold"])
    if share in (0.0, 1.0):
        logger.warning(
            "the threshold %.6g is exceeded by %s entropy of the training images: patches are %s",
            rule["threshold"],
            "every" if share else "no",
            "single tokens" if share else "opened by rows and max_length alone",
        )
    return {"threshold": rule["threshold"], "share_above_threshold": share}


if __name__ == "__main__":
    main(sample, SampleConfig)
