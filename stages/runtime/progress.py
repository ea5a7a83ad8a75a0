"""Progress of a stage, for people: `record/progress.json` for the bar of the command line, plain lines for the log."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from stages.runtime.artifact import RECORD

logger = logging.getLogger(__name__)
FILE_PERIOD_S = 0.5
LINE_PERIOD_S = 15.0


class Progress:
    """Counts `done` of `total` units of a named thing; silent on every process but the main one.

    A resumed stage starts above zero: `done` is the place, and the rate counts only what this process has done.
    """

    def __init__(self, output: Path, what: str, total: int, *, done: int = 0, enabled: bool = True) -> None:
        self.path = output / RECORD / "progress.json"
        self.what, self.total, self.done = what, total, done
        self._first_done = done
        self._enabled = enabled
        self._started = time.monotonic()
        self._last_file = self._last_line = float("-inf")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.update(done)

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` units are finished; `note` is shown beside the bar, e.g. the loss."""
        self.done = done
        if not self._enabled:
            return
        now = time.monotonic()
        last = done >= self.total
        if last or now - self._last_file >= FILE_PERIOD_S:
            self._last_file = now
            self._write(note, now)
        if last or now - self._last_line >= LINE_PERIOD_S:
            self._last_line = now
            logger.info("%s %d/%d %s", self.what, done, self.total, note)

    def _write(self, note: str, now: float) -> None:
        """Replace the file without a flush to disk: it is a view, lost without harm."""
        rate = (self.done - self._first_done) / max(now - self._started, 1e-9)
        state = {"what": self.what, "done": self.done, "total": self.total, "per_second": rate, "note": note}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(self.path)
