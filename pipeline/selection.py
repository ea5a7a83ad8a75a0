"""Selection of stages: `--from`, `--until` and `--force` of the command line and of the Prefect flow.

The settings decide which stages belong to a run: stages that nothing reads under them are left out.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace

from conf.schema import Settings
from pipeline.cache.external import weights_path
from pipeline.graph import STAGES, downstream, upstream
from pipeline.plan import StageStatus
from stages.runtime.errors import InputError

_LAST = next(reversed(STAGES))


def known_stage(name: str) -> str:
    """`name`, checked to be the name of a stage.

    Raises:
        InputError: There is no such stage.
    """
    if name not in STAGES:
        raise InputError(f"stage is {name!r}, expected one of {', '.join(STAGES)}")
    return name


def select(
    settings: Settings, from_stage: str | None = None, until_stage: str | None = None, force: Iterable[str] = ()
) -> list[str]:
    """Names of the selected stages, in a valid order of execution.

    Args:
        settings: They decide which stages read each other.
        from_stage: First stage; stages that do not depend on it are left out. None for all.
        until_stage: Last stage; stages that it does not depend on are left out. None for the last of the graph.
        force: Stages that must be among the selected ones.

    Raises:
        InputError: A stage is unknown, no stage is selected, or a forced stage is not selected.
    """
    last = known_stage(until_stage or _LAST)
    wanted = {last} | upstream(last, settings)
    if from_stage is not None:
        wanted &= {known_stage(from_stage)} | downstream(from_stage, settings)
    if not wanted:
        raise InputError(
            f"no stage from {from_stage} until {last}: under these settings {last} does not depend on {from_stage}"
        )
    for name in force:
        if known_stage(name) not in wanted:
            raise InputError(f"--force is {name}, expected one of the selected stages: {', '.join(_ordered(wanted))}")
    return _ordered(wanted)


def selected_statuses(
    statuses: Iterable[StageStatus],
    wanted: Iterable[str],
    settings: Settings,
    *,
    force: Iterable[str] = (),
    given: str = "",
) -> list[StageStatus]:
    """Statuses of the selected stages. Forced stages that are cached are shown as stale.

    Args:
        statuses: Statuses of all stages.
        wanted: Names of the selected stages.
        settings: They decide which stages read each other.
        force: Names of selected stages to make again.
        given: Options that chose the settings, for the error message; see `as_options`.

    Raises:
        InputError: A selected stage needs a stage that is neither cached nor selected, or a file that is no weights.
    """
    wanted, by_name = set(wanted), {status.stage: status for status in statuses}
    for name in _ordered(wanted):
        for needed in _ordered(upstream(name, settings) - wanted):
            if by_name[needed].state != "cached":
                raise InputError(
                    f"{name} reads {needed}, which is {by_name[needed].state} ({by_name[needed].reason}), expected "
                    f"cached: make it with `dpar run{given} --until {needed}`"
                )
    for name in force:
        if by_name[name].state == "cached":
            by_name[name] = replace(by_name[name], state="stale", reason="requested by --force")
    found = [by_name[name] for name in _ordered(wanted)]
    for status in found:
        if status.state != "cached":  # hours of other stages may come before it
            weights_path(STAGES[status.stage], getattr(settings, status.stage))
    return found


def as_options(preset: str | None, ablation: str | None, overrides: Sequence[str]) -> str:
    """The options of the command line that chose the settings, each with a leading space."""
    named = [("--preset", preset), ("--ablation", ablation), *(("--set", override) for override in overrides)]
    return "".join(f" {option} {shlex.quote(value)}" for option, value in named if value is not None)


def _ordered(names: set[str]) -> list[str]:
    return [name for name in STAGES if name in names]
