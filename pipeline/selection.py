"""Which stages a command asks for: the `--from`, `--until` and `--force` of the command line and of the flow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pipeline.graph import STAGES, downstream, upstream
from pipeline.plan import StageStatus
from stages.runtime.errors import InputError


def known_stage(name: str) -> str:
    """`name`, if a stage has it.

    Raises:
        InputError: None has.
    """
    if name not in STAGES:
        raise InputError(f"stage is {name!r}, expected one of {', '.join(STAGES)}")
    return name


def select(from_stage: str | None = None, until_stage: str | None = None, force: Iterable[str] = ()) -> list[str]:
    """Names of the stages asked for, in an order in which they can run.

    Args:
        from_stage: Leave out what does not depend on this stage.
        until_stage: Leave out what this stage does not depend on.
        force: Stages that must be among those asked for.

    Raises:
        InputError: Unknown stage, nothing left to do, or a forced stage that is left out.
    """
    wanted = set(STAGES)
    if from_stage is not None:
        wanted &= {known_stage(from_stage)} | downstream(from_stage)
    if until_stage is not None:
        wanted &= {known_stage(until_stage)} | upstream(until_stage)
    if not wanted:
        raise InputError(f"--from {from_stage} --until {until_stage} leaves no stage: {until_stage} comes first")
    for name in force:
        if known_stage(name) not in wanted:
            raise InputError(f"--force {name} is not among the stages asked for: {', '.join(_ordered(wanted))}")
    return _ordered(wanted)


def asked_for(statuses: Iterable[StageStatus], wanted: Iterable[str], force: Iterable[str] = ()) -> list[StageStatus]:
    """The statuses of the stages in `wanted`, those in `force` shown as what they will be: made again.

    Raises:
        InputError: A stage in `wanted` needs one that is neither cached nor itself in `wanted`.
    """
    wanted, by_name = set(wanted), {status.stage: status for status in statuses}
    needed = set().union(*(upstream(name) for name in wanted)) - wanted
    for name in _ordered(needed):
        if by_name[name].state != "cached":
            raise InputError(
                f"{name} is {by_name[name].state} ({by_name[name].reason}), expected cached: "
                f"leave out --from, or make it with `dpar run --until {name}`"
            )
    for name in force:
        if by_name[name].state == "cached":
            by_name[name] = replace(by_name[name], state="stale", reason="asked for by --force")
    return [by_name[name] for name in _ordered(wanted)]


def _ordered(names: set[str]) -> list[str]:
    return [name for name in STAGES if name in names]
