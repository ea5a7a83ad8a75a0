"""A run of the pipeline: which stages were asked for, and one after the other.

The command line and Prefect's flow both run it. No server takes part: servers are told by observers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.load import load_settings
from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.budget.advice import advice
from pipeline.budget.enough import repeated_images, require_enough
from pipeline.graph import STAGES, inputs_read
from pipeline.plan import StageStatus, cached_paths, plan
from pipeline.runner import Observer, StageResult, run_stage
from pipeline.selection import as_options, select, selected_statuses

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a user asked for; None and empty stand for the defaults."""

    preset: str | None = None
    ablation: str | None = None
    overrides: tuple[str, ...] = ()
    from_stage: str | None = None
    until_stage: str | None = None
    force: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the run in lists: its preset, ablation and overrides."""
        changes = [text for text in self.overrides if not text.startswith("runtime.")]
        return " ".join(word for word in (self.preset or "base", self.ablation, *changes) if word)

    def parameters(self) -> dict[str, Any]:
        """The request as parameters of the flow, which Prefect shows."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class WholeRun:
    """A request with its settings, and the state of each selected stage before the run, in order."""

    request: Request
    settings: Settings
    runtime: RuntimeConfig
    statuses: list[StageStatus]

    @property
    def inputs(self) -> dict[str, list[str]]:
        """The selected stages that each selected stage reads."""
        names = [status.stage for status in self.statuses]
        return {name: [each for each in inputs_read(STAGES[name], self.settings) if each in names] for name in names}

    def advice(self) -> list[str]:
        """Warnings of what will be slow or will not fit."""
        missing = [status.stage for status in self.statuses if status.state != "cached"]
        return list(advice(self.settings, self.runtime, self.request.preset, missing))

    def notes(self) -> list[tuple[int, str]]:
        """Lines for the run's log: states of the stages, and advice."""
        states = [f"{status.stage} is {status.state}: {status.reason}" for status in self.statuses]
        return [(logging.INFO, line) for line in states] + [(logging.WARNING, line) for line in self.advice()]


def plan_run(request: Request, load: Callable[..., tuple[Settings, RuntimeConfig]] = load_settings) -> WholeRun:
    """Load the settings with `load`, select the stages, and look at each image file.

    Raises:
        SettingsError: The settings are invalid.
        InputError: A selected stage cannot run, or a file named in the settings is missing.
    """
    chosen = request.preset, request.ablation, request.overrides
    settings, runtime = load(*chosen)
    wanted = select(settings, request.from_stage, request.until_stage, request.force)
    planned = plan(settings, runtime, deep=True)
    statuses = selected_statuses(planned, wanted, settings, force=request.force, given=as_options(*chosen))
    _check_images(settings, wanted, cached_paths(statuses).get("dataset"))
    return WholeRun(request, settings, runtime, statuses)


def run_stages(run: WholeRun, observer: Observer) -> list[StageResult]:
    """Run the selected stages one after the other; the first failure ends the run.

    Raises:
        InputError: A stage cannot run, or a file named in the settings is missing.
        ArtifactError: An input is damaged.
        StageFailed: A stage's process failed.
    """
    results, names = [], [status.stage for status in run.statuses]
    for number, name in enumerate(names):
        force = name in run.request.force
        results.append(run_stage(STAGES[name], run.settings, run.runtime, force=force, observer=observer))
        if name == "dataset" and results[-1].state != "cached":
            _check_images(run.settings, names[number + 1 :], results[-1].path)
    return results


def _check_images(settings: Settings, stages: Sequence[str], dataset: Path | None) -> None:
    """Refuse to go on with too few images, and warn where images are repeated."""
    require_enough(settings, stages, dataset)
    if dataset is not None:
        for line in repeated_images(settings, stages, dataset):
            logger.warning("%s", line)
