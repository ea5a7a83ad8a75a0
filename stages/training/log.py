"""metrics.jsonl: one JSON object a line, `step` in each. The file is the truth; trackers follow it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from stages.runtime.artifact import RECORD


class MetricLog:
    """Appends metrics; lines after `step` are cut off at the start, because a resumed run makes them again."""

    def __init__(self, output: Path, step: int, *, enabled: bool) -> None:
        self.path = output / RECORD / "metrics.jsonl"
        self._enabled = enabled
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._truncate(step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line; it is whole on disk for any reader that waits for the newline."""
        if self._enabled:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

    def _truncate(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line in _whole_lines(self.path) if json.loads(line)["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self.path)


def _whole_lines(path: Path) -> list[str]:
    """Lines that end in a newline: a killed writer may leave a torn last one."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
