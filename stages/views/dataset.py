"""View of stage `dataset`: how many images there are."""

from __future__ import annotations

from pathlib import Path

from conf.dataset import DatasetConfig
from conf.runtime import RuntimeConfig
from stages.runtime.artifact import RECORD, read_json, write_json
from stages.runtime.job import Inputs, main
from stages.stores.image_index import ImageIndex


def dataset(config: DatasetConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `metrics.json`: images of each part, classes, broken images, and other files that were left out."""
    index = ImageIndex.of(inputs)
    left_out = inputs["dataset"] / RECORD / "left_out.json"
    metrics = {
        "num_images": len(index),
        "num_train": index.num_train,
        "num_heldout": index.num_heldout,
        "num_classes": len(index.classes),
        "num_broken": len(read_json(inputs["dataset"] / RECORD / "broken.json")),
        "num_left_out": sum(files["count"] for files in read_json(left_out).values()) if left_out.exists() else 0,
    }
    write_json(output / "metrics.json", metrics)


if __name__ == "__main__":
    main(dataset, DatasetConfig)
