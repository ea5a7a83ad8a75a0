"""metrics.jsonl: one JSON object per line, each with a `step`. Trackers copy this file."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from stages.runtime.artifact import RECORD, write_atomic

logger = logging.getLogger(__name__)
POSITIONS_FILE = Path(RECORD) / "heldout_by_position.json"
"""Where the record of a trained token model has its held-out loss by position."""


class MetricLog:
    """Appends metrics. Lines after `step` are removed at the start: a resumed run writes them again."""

    def __init__(self, output: Path, step: int, *, enabled: bool) -> None:
        self.path = output / RECORD / "metrics.jsonl"
        self._enabled = enabled
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._truncate(step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line. A line that ends with a newline is whole."""
        if self._enabled:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

    def _truncate(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        steps = [_step(line) for line in lines]
        # A last line without a newline is not damage: its writer was killed.
        damaged = sum(found is None and line.endswith(b"\n") for line, found in zip(lines, steps, strict=True))
        if damaged:
            logger.warning("%s is damaged, lines dropped: %d", self.path, damaged)
        kept = [line for line, found in zip(lines, steps, strict=True) if found is not None and found <= step]
        write_atomic(self.path, lambda file: file.write(b"".join(kept)))


def _step(line: bytes) -> int | None:
    """Step of a line; None if the line is damaged or incomplete."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
