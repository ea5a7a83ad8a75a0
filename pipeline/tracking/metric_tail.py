"""The curves of a stage: what its metrics.jsonl has that MLflow does not know yet, whatever was killed in between."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from stages.runtime.artifact import RECORD, read_json, write_json


@dataclass(frozen=True)
class Point:
    """One value of one curve."""

    name: str
    step: int
    value: float


class MetricTail:
    """Reads a stage's metrics.jsonl while it grows.

    Attributes:
        folder: The stage's work folder, or its artifact.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offset = 0
        self._file_id = 0

    def points(self) -> list[Point]:
        """New points of whole lines. A stage that is resumed replaces the file: then it is read from its start."""
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
        lines = [json.loads(line) for line in whole.decode().splitlines()]
        return [
            Point(name, line["step"], float(value)) for line in lines for name, value in line.items() if name != "step"
        ]


@dataclass
class StageRun:
    """MLflow's run for a key, kept beside the artifacts: a manifest is never written again, and a work folder goes.

    `open`: it has not ended well yet, so another attempt at the key goes on in it. `steps`: the last step that MLflow
    knows of each curve; a resumed stage writes steps again, and MLflow would show them twice.
    """

    run_id: str
    open: bool = True
    steps: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, key: str) -> Self | None:
        """The run of a key, None when it has none."""
        path = folder / f"{key}.json"
        return cls(**read_json(path)) if path.exists() else None

    def write(self, folder: Path, key: str) -> None:
        """Keep it."""
        write_json(folder / f"{key}.json", asdict(self))

    def fresh(self, points: Iterable[Point]) -> list[Point]:
        """The points that MLflow does not know."""
        return [point for point in points if point.step > self.steps.get(point.name, -1)]

    def add(self, points: Iterable[Point]) -> None:
        """MLflow knows these now."""
        for point in points:
            self.steps[point.name] = max(point.step, self.steps.get(point.name, -1))
