"""Progress of a process, read from the file that its stage writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.runtime.artifact import read_json

OnProgress = Callable[[dict[str, Any]], None]


class ProgressFile:
    """Passes on each new state of `record/progress.json`."""

    def __init__(self, record: Path, on_progress: OnProgress) -> None:
        self._path, self._on_progress = record / "progress.json", on_progress
        self._seen = ""

    def pass_on(self) -> None:
        """Pass on the state in the file if it is new."""
        try:
            text = self._path.read_text(encoding="utf-8")
            if text != self._seen:
                self._on_progress(read_json(self._path))
        except (OSError, ValueError):  # not written yet
            return
        self._seen = text
