"""Gates: numbers that a change must not spoil, read from finished artifacts or measured on fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pipeline.report import read_metrics
from stages.errors import ArtifactError

STATUS_BOUND_S = 1.0
CACHED_RUN_BOUND_S = 10.0
REPEATS = 5
LADDER = ("fd_lite0_heldout", "fd_lite0_reconstruction", "fd_lite0", "fd_lite0_marginals", "fd_lite0_random")

Metrics = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A measured value and its bound; the name says how they must compare."""

    name: str
    value: float
    bound: float
    met: bool


def demo_gates(artifacts: Mapping[str, Path]) -> list[Gate]:
    """Whether the models of the demo learned: its finished artifacts' numbers against what needs no learning.

    Raises:
        ArtifactError: A number is not there.
    """
    stages = ("entropy_model", "patch_index", "train", "sample", "evaluate")
    metrics = {stage: read_metrics(artifacts[stage]) for stage in stages}
    scores = metrics["evaluate"]
    patch_length = _number(metrics, "patch_index", "mean_length")
    for name in LADDER:
        _number(metrics, "evaluate", name)
    return [
        *(
            _below(
                f"{stage}: held-out loss < unigram loss, nats",
                _number(metrics, stage, "heldout_loss"),
                _number(metrics, stage, "unigram_loss"),
            )
            for stage in ("entropy_model", "train")
        ),
        *(_below(f"{better} < {worse}", scores[better], scores[worse]) for better, worse in pairwise(LADDER)),
        _below("fd_lite0 / fd_lite0_marginals", scores["fd_lite0"] / scores["fd_lite0_marginals"], 0.8),
        _below("fd_lite0 / fd_lite0_random", scores["fd_lite0"] / scores["fd_lite0_random"], 0.7),
        _above("mean patch length, tokens, at least", patch_length, 1.5),
        _below("mean patch length, tokens, at most", patch_length, 2.5),
        _below(
            "share of positions left for the global stack, while sampling",
            1 / _number(metrics, "sample", "sample_mean_patch_length"),
            1 / 1.5,
        ),
    ]


def cli_gates(overrides: Sequence[str] = ()) -> list[Gate]:
    """Median wall time of the commands that people wait for, each a fresh process; the demo must be cached.

    Raises:
        ArtifactError: A command failed; the message holds the end of what it said.
    """
    shared = ["--preset", "demo", *(word for override in overrides for word in ("--set", override))]
    return [
        _below("dpar status, s", _median_seconds(["status", *shared], REPEATS), STATUS_BOUND_S),
        _below("dpar run, all cached, s", _median_seconds(["run", *shared], REPEATS), CACHED_RUN_BOUND_S),
    ]


def _median_seconds(arguments: Sequence[str], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *arguments], capture_output=True, text=True, check=False
        )
        seconds.append(time.perf_counter() - start)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise ArtifactError(f"dpar {' '.join(arguments)} ended with {done.returncode}: {''.join(said)}")
    return statistics.median(seconds)


def _number(metrics: Mapping[str, Metrics], stage: str, name: str) -> float:
    if name not in metrics[stage]:
        raise ArtifactError(f"{stage}/metrics.json has no {name}: make it again with `dpar run --force {stage}`")
    return metrics[stage][name]


def _below(name: str, value: float, bound: float) -> Gate:
    """Met when `value < bound`; a NaN meets nothing."""
    return Gate(name=name, value=value, bound=bound, met=value < bound)


def _above(name: str, value: float, bound: float) -> Gate:
    return Gate(name=name, value=value, bound=bound, met=value >= bound)
