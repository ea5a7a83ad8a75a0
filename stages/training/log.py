"""metrics.jsonl: one JSON object a line, `step` in each. The file is the truth; trackers follow it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from stages.runtime.artifact import RECORD, write_atomic

logger = logging.getLogger(__name__)


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
        lines = self.path.read_bytes().splitlines(keepends=True)
        steps = [_step(line) for line in lines]
        # A torn last line, without a newline, is no damage: its writer was killed.
        damaged = sum(found is None and line.endswith(b"\n") for line, found in zip(lines, steps, strict=True))
        if damaged:
            logger.warning("%s is damaged, lines dropped: %d", self.path, damaged)
        kept = [line for line, found in zip(lines, steps, strict=True) if found is not None and found <= step]
        write_atomic(self.path, lambda file: file.write(b"".join(kept)))


def _step(line: bytes) -> int | None:
    """Step of a line; None if it is damaged or torn."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
