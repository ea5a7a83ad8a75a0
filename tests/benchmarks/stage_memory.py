"""Does the memory of a stage grow with the data set? Peaks of all, each a process, over N and 10 N tiny images."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peaks import peak, tiny_images
from report import report

from pipeline.bench.gates import Gate, gate
from pipeline.graph import STAGES

FACTOR = 10
GROWTH_BOUND = 1.1
SETTINGS = (
    "tokenizer.image_size=16",
    "tokenizer.adversarial_weight=0",
    "tokenize.image_size=16",
    "tokenize.chunk_rows=256",
    "sample.image_size=16",
    "sample.num_samples=200",
    "sample.batch_size=50",
    "evaluate.compared=500",  # its default of 10,000 is more than there are here
)


def peaks(stages: Sequence[str], count: int, folder: Path) -> dict[str, int]:
    """Largest memory of each of the stages over a data set of `count` images."""
    images = folder / f"{count}.tar"
    tiny_images(images, count)
    return {name: peak(name, images, folder / str(count), SETTINGS) for name in stages}


def main() -> None:
    """Measure all stages and print what was found."""
    parser = argparse.ArgumentParser(description="Memory of every stage as the data set grows tenfold.")
    parser.add_argument("--few", type=int, default=1000, help="images of the smaller data set; the other has ten times")
    parser.add_argument("--until", choices=list(STAGES), default=list(STAGES)[-1], help="last stage to measure")
    options = parser.parse_args()
    stages = list(STAGES)[: list(STAGES).index(options.until) + 1]
    counts = (options.few, FACTOR * options.few)
    with tempfile.TemporaryDirectory() as folder:
        few, many = (peaks(stages, count, Path(folder)) for count in counts)
    columns = {
        f"peak memory, MB: {counts[0]:,} images": {name: peak / 1e6 for name, peak in few.items()},
        f"{counts[1]:,} images": {name: peak / 1e6 for name, peak in many.items()},
    }
    gates: list[Gate] = [
        gate(f"{name}: peak memory at {FACTOR} times the images", many[name] / few[name], "<", GROWTH_BOUND)
        for name in stages
    ]
    report(gates, columns)


if __name__ == "__main__":
    main()
