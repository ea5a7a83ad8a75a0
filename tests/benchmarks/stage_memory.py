"""Does the memory of a stage grow with the data set? Peaks of all, each a process, over N and 10 N tiny images."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from image_stages import tiny_images
from report import report

from conf.load import load_settings
from conf.runtime import RuntimeConfig
from pipeline.bench.gates import Gate, gate
from pipeline.graph import STAGES

FACTOR = 10
GROWTH_BOUND = 1.1
SETTINGS = (
    "dataset.source=imagenet_tar",
    "tokenizer.image_size=16",
    "tokenizer.adversarial_weight=0",
    "tokenize.image_size=16",
    "tokenize.chunk_rows=256",
    "sample.image_size=16",
    "sample.num_samples=200",
    "sample.batch_size=50",
    "evaluate.compared=500",  # its default of 10,000 is more than there are here
)
# glibc adapts its thresholds to what was freed, and threads share arenas by chance: peaks would jump by megabytes.
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}


def run_stage(name: str, images: Path, home: Path) -> None:
    """Run a stage in this process, and print the most bytes it ever held."""
    settings, _ = load_settings("tiny", None, [*SETTINGS, f"dataset.root={images}"])
    module, function = STAGES[name].entry
    inputs = {stage: home / stage for stage in STAGES[name].inputs} | {"images": images}
    stage = getattr(importlib.import_module(module), function)
    stage(getattr(settings, name), inputs, home / name, RuntimeConfig(device="cpu", threads=1))
    status = Path("/proc/self/status").read_text()
    print(1024 * int(status.split("VmHWM:")[1].split()[0]))


def peaks(stages: Sequence[str], count: int, folder: Path) -> dict[str, int]:
    """Largest memory of each of the stages over a data set of `count` images."""
    images = folder / f"{count}.tar"
    tiny_images(images, count)
    found = {}
    for name in stages:
        options = {"--stage": name, "--images": images, "--home": folder / str(count)}
        command = [sys.executable, __file__, *(str(word) for option in options.items() for word in option)]
        done = subprocess.run(command, env=os.environ | STEADY, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = int(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure all stages and print what was found."""
    parser = argparse.ArgumentParser(description="Memory of every stage as the data set grows tenfold.")
    parser.add_argument("--few", type=int, default=1000, help="images of the smaller data set; the other has ten times")
    parser.add_argument("--until", choices=list(STAGES), default=list(STAGES)[-1], help="last stage to measure")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--images", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        run_stage(options.stage, options.images, options.home)
        return
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
