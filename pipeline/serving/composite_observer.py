"""An observer that forwards events to several observers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.runner import Observer, StageResult


class CompositeObserver:
    """Forwards each event to several observers, in order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def stage_waiting(self, stage: str, message: str) -> None:
        """Forward to each observer."""
        for observer in self._observers:
            observer.stage_waiting(stage, message)

    def stage_started(self, stage: str, key: str, work: Path) -> None:
        """Forward to each observer."""
        for observer in self._observers:
            observer.stage_started(stage, key, work)

    def stage_progress(self, stage: str, progress: dict[str, Any]) -> None:
        """Forward to each observer."""
        for observer in self._observers:
            observer.stage_progress(stage, progress)

    def stage_finished(self, result: StageResult) -> None:
        """Forward to each observer."""
        for observer in self._observers:
            observer.stage_finished(result)

    def stage_failed(self, stage: str, error: BaseException) -> None:
        """Forward to each observer."""
        for observer in self._observers:
            observer.stage_failed(stage, error)
