"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "blocker"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "blocker")


@dataclass(frozen=True)
class Finding:
    """One line of `dpar doctor`.

    Attributes:
        check: Name of what was checked.
        level: `blocker`: nothing runs, or runs hang or lose work. `warning`: something is slow or will not work.
        found: What was found.
        advice: What to do; empty if the level is `ok`.
    """

    check: str
    level: Level
    found: str
    advice: str = ""


def ok(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "ok", found)


def warning(check: str, found: str, advice: str) -> Finding:
    """Something is slow, or some settings will not work."""
    return Finding(check, "warning", found, advice)


def blocker(check: str, found: str, advice: str) -> Finding:
    """Nothing runs, or runs hang or lose work."""
    return Finding(check, "blocker", found, advice)


def worst(findings: list[Finding]) -> Level:
    """The worst level of some findings."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")
