"""Progress of a stage: `record/progress.json` for the command line's progress bar, and lines in the log."""

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
    """Counts `done` of `total` things of a kind. Only the main process reports.

    A resumed stage starts with `done` above zero. The rate only counts the work of this process.
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
        """Set the number of finished things. `note` is shown beside the bar, e.g. the loss."""
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
        """Replace the file without a flush to disk, because its loss does no harm."""
        rate = (self.done - self._first_done) / max(now - self._started, 1e-9)
        state = {"what": self.what, "done": self.done, "total": self.total, "per_second": rate, "note": note}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(self.path)
