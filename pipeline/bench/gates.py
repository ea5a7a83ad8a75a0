"""Gates: measured numbers with bounds that a change must keep, read from artifacts or timed in new processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from stages.runtime.errors import ArtifactError, InputError

STATUS_BOUND_S = 0.9
CACHED_RUN_BOUND_S = 1.0
REPEATS = 5
LADDER = tuple(f"fd_lite0_{rung}" for rung in ("heldout", "reconstruction", "samples", "marginals", "random"))
ORDERED_PAIRS = (
    ("entropy_model_heldout_loss", "entropy_model_unigram_loss"),
    ("train_heldout_loss", "train_unigram_loss"),
    *pairwise(LADDER),
)
CODE_ROOT = Path(__file__).resolve().parents[2]
SCRIPTS_FOLDER = CODE_ROOT / "tests" / "benchmarks"
SCRIPTS = {
    "train-step": ("train_step.py", "loop_overhead.py"),
    "sample": ("sample_speed.py", "sample_parts.py", "draws.py"),
    "data": ("data_stores.py", "data_loader.py", "image_stages.py", "stage_memory.py"),
    "structure": ("structure.py",),
    "gpu": ("gpu_check.py",),
}
NAMES = ("demo", "cli", "plan", *SCRIPTS)
Relation = Literal["<", ">"]
Figures = dict[str, dict[str, float]]  # values by column and row of a table
BOUNDS: tuple[tuple[str, Relation, float], ...] = (
    ("ratio_to_marginals", "<", 0.8),
    ("ratio_to_random", "<", 0.7),
    ("patch_index_mean_length", ">", 1.5),
    ("patch_index_mean_length", "<", 2.5),
    ("sample_mean_patch_length", ">", 1.5),  # the global stack then has at most two thirds of the positions
    ("entropy_head_correlation", ">", 0.9),  # with entropies of the entropy model, on held-out images
    ("entropy_head_agreement", ">", 0.85),
)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A measured value and its bound. The name contains the relation."""

    name: str
    value: float
    bound: float
    met: bool


def demo_gates(metrics: Mapping[str, float]) -> list[Gate]:
    """Gates on the scores of the demo: its models must beat baselines that learn nothing beyond token frequencies.

    Raises:
        ArtifactError: A score is missing.
    """
    wanted = {name for pair in ORDERED_PAIRS for name in pair} | {name for name, _, _ in BOUNDS}
    missing = sorted(wanted - metrics.keys())
    if missing:
        raise ArtifactError(
            f"evaluate has no {', '.join(missing)}: compute the scores again with `dpar views --preset demo`"
        )
    return [
        *(gate(f"{low} < {high}", metrics[low], "<", metrics[high]) for low, high in ORDERED_PAIRS),
        *(gate(f"{name} {relation} {bound}", metrics[name], relation, bound) for name, relation, bound in BOUNDS),
    ]


def cli_gates(overrides: Sequence[str] = ()) -> list[Gate]:
    """Median wall time of `dpar status` and of a cached `dpar run`, each in a new process. The demo must be cached.

    Raises:
        ArtifactError: A command failed. The message has its last line of output.
    """
    shared = ["--preset", "demo", *(word for override in overrides for word in ("--set", override))]
    return [
        gate("dpar status, s", _median_seconds(["status", *shared], REPEATS), "<", STATUS_BOUND_S),
        gate("dpar run, all cached, s", _median_seconds(["run", *shared], REPEATS), "<", CACHED_RUN_BOUND_S),
    ]


def run_scripts(name: str) -> tuple[list[Gate], Figures]:
    """Run the scripts of a benchmark, which take minutes; return their gates and other figures.

    Raises:
        InputError: dpar was installed without its source tree, which has the scripts.
        ArtifactError: A script failed.
    """
    gates: list[Gate] = []
    figures: Figures = {}
    for script in SCRIPTS[name]:
        path = SCRIPTS_FOLDER / script
        if not path.is_file():
            raise InputError(
                f"{path} does not exist, expected the source tree of dpar: run this benchmark from a clone"
            )
        done = subprocess.run([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise ArtifactError(
                f"{script} of benchmark {name} ended with exit code {done.returncode}: its output is above"
            )
        said = json.loads(done.stdout.splitlines()[-1])  # lines before it are findings as they came
        gates += [Gate(**gate) for gate in said["gates"]]
        figures |= said["figures"]
    return gates, figures


def _median_seconds(arguments: Sequence[str], repeats: int) -> float:
    """Median over `repeats` processes, after one that is not counted. Python keeps the modules that it compiled."""
    command = [sys.executable, "-P", "-m", "pipeline.cli.main", *arguments]  # no code from the current folder
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CODE_ROOT), os.environ.get("PYTHONPATH")]))
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise ArtifactError(f"dpar {' '.join(arguments)} ended with exit code {done.returncode}: {''.join(said)}")
    return statistics.median(seconds[1:])


def gate(name: str, value: float, relation: Relation, bound: float) -> Gate:
    """Compare a value with its bound; NaN misses every bound."""
    return Gate(name=name, value=value, bound=bound, met=value < bound if relation == "<" else value > bound)
