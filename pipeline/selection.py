"""Which stages a command asks for: the `--from`, `--until` and `--force` of the command line and of the flow.

What belongs to a run follows from its settings: a stage that nothing reads under them is left out.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace

from conf.schema import Settings
from pipeline.graph import STAGES, downstream, upstream
from pipeline.plan import StageStatus
from stages.runtime.errors import InputError

_LAST = next(reversed(STAGES))


def known_stage(name: str) -> str:
    """`name`, if a stage has it.

    Raises:
        InputError: None has.
    """
    if name not in STAGES:
        raise InputError(f"stage is {name!r}, expected one of {', '.join(STAGES)}")
    return name


def select(
    settings: Settings, from_stage: str | None = None, until_stage: str | None = None, force: Iterable[str] = ()
) -> list[str]:
    """Names of the stages asked for, in an order in which they can run.

    Args:
        settings: They decide which stages read each other.
        from_stage: Leave out what does not depend on this stage.
        until_stage: Make this stage, and leave out what it does not depend on.
        force: Stages that must be among those asked for.

    Raises:
        InputError: Unknown stage, nothing left to do, or a forced stage that is left out.
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
            raise InputError(f"--force {name} is not among the stages asked for: {', '.join(_ordered(wanted))}")
    return _ordered(wanted)


def asked_for(
    statuses: Iterable[StageStatus],
    wanted: Iterable[str],
    settings: Settings,
    *,
    force: Iterable[str] = (),
    given: str = "",
) -> list[StageStatus]:
    """The statuses of the stages in `wanted`, those in `force` shown as what they will be: made again.

    Args:
        statuses: Of all stages.
        wanted: Names of stages.
        settings: They decide which stages read each other.
        force: Names of stages among them.
        given: The options that chose the settings, see `as_options`, for advice.

    Raises:
        InputError: A stage in `wanted` needs one that is neither cached nor itself in `wanted`.
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
            by_name[name] = replace(by_name[name], state="stale", reason="asked for by --force")
    return [by_name[name] for name in _ordered(wanted)]


def as_options(preset: str | None, ablation: str | None, overrides: Sequence[str]) -> str:
    """What chose the settings, as options of the command line with a space before each."""
    named = [("--preset", preset), ("--ablation", ablation), *(("--set", override) for override in overrides)]
    return "".join(f" {option} {shlex.quote(value)}" for option, value in named if value is not None)


def _ordered(names: set[str]) -> list[str]:
    return [name for name in STAGES if name in names]
