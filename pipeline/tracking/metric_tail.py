"""Metrics of a stage that MLflow has not received yet, read from metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from stages.runtime.artifact import RECORD, read_json, write_json


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    name: str
    step: int
    value: float


class MetricTail:
    """Reads a stage's metrics.jsonl while it grows.

    Attributes:
        folder: Work folder or artifact of the stage.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offset = 0
        self._file_id = 0

    def points(self) -> list[Point]:
        """New points, from complete lines. A resumed stage replaces the file, which is then read from its start."""
        path = self.folder / RECORD / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                file_id = path.stat().st_ino
                if file_id != self._file_id:
                    self._file_id, self._offset = file_id, 0
                file.seek(self._offset)
                text = file.read()
        except OSError:  # most stages have none
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [point for line in whole.splitlines() for point in _points(line)]


def _points(line: bytes) -> list[Point]:
    """Points of one line; none if the line is damaged, which a view does not mend."""
    try:
        values = json.loads(line)
        step = int(values.pop("step"))
        return [Point(name, step, float(value)) for name, value in values.items()]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


@dataclass
class StageRun:
    """MLflow run of a key, stored in a file in home/.servers/runs.

    `open`: the stage has not finished, so another attempt at the key continues this run. `steps`: last step of each
    metric that MLflow has received; a resumed stage writes some steps again, and MLflow would show them twice.
    """

    run_id: str
    open: bool = True
    steps: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, key: str) -> Self | None:
        """The run of a key; None if it has none, or if the file is damaged: the next attempt gets a new run."""
        try:
            known = cls(**read_json(folder / f"{key}.json"))
            steps = known.steps.values()
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        return known if isinstance(known.run_id, str) and all(isinstance(step, int) for step in steps) else None

    def write(self, folder: Path, key: str) -> None:
        """Write the file."""
        write_json(folder / f"{key}.json", asdict(self))

    def fresh(self, points: Iterable[Point]) -> list[Point]:
        """The points that MLflow has not received."""
        return [point for point in points if point.step > self.steps.get(point.name, -1)]

    def add(self, points: Iterable[Point]) -> None:
        """Record that MLflow has received these points."""
        for point in points:
            self.steps[point.name] = max(point.step, self.steps.get(point.name, -1))
