"""Planned times of finished stages beside their measured ones, on this machine's CPU.

The shares and seconds in `hours` and `work` that no data sheet gives were chosen on the demo: the time that a stage
takes to start, the shares of a matrix product that each kind of work reaches, and the seconds to decode and crop. The
demo measures each of them in another stage, and its gates hold all of them to a factor of two.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.bench.gates import Figures, Gate, gate
from pipeline.budget.budget import make_budget
from pipeline.budget.cards import Card
from pipeline.budget.images import count_images
from pipeline.budget.shape import shape_of
from pipeline.cache.manifest import read_manifest
from pipeline.plan import require_cached
from pipeline.selection import select

FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A stage's planned and measured time, seconds."""

    stage: str
    planned: float
    measured: float


def check(settings: Settings, runtime: RuntimeConfig, card: Card) -> list[Checked]:
    """Every stage of finished settings, planned on a card.

    Raises:
        InputError: A stage is not cached.
    """
    stages = select(settings)
    paths = require_cached(settings, runtime, stages, "dpar run")
    shape = shape_of(settings, *count_images(settings, runtime))
    budget = make_budget(settings, shape, stages, card)
    return [
        Checked(stage=row.stage, planned=row.time.seconds, measured=read_manifest(paths[row.stage]).duration_s)
        for row in budget.stages
    ]


def plan_gates(found: list[Checked]) -> tuple[list[Gate], Figures]:
    """Gates on the ratio of planned to measured time of each stage, and the times."""
    gates: list[Gate] = []
    for row in found:
        name, ratio = f"{row.stage}: planned / measured", row.planned / row.measured
        gates += [
            gate(f"{name} > {1 / FACTOR:g}", ratio, ">", 1 / FACTOR),
            gate(f"{name} < {FACTOR:g}", ratio, "<", FACTOR),
        ]
    return gates, {
        "planned, s": {row.stage: row.planned for row in found},
        "measured, s": {row.stage: row.measured for row in found},
    }
