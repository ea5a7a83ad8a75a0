"""Observers that forward events to several observers, and log lines to a logger."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.runner import Observer, StageResult
from stages.runtime.artifact import RECORD

AnyLogger = logging.Logger | logging.LoggerAdapter[Any]
_PERIOD_S = 2.0
_MAX_LINES = 40  # forwarded at once; the log file has all lines


class CompositeObserver:
    """Forwards each event to several observers, in order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

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


class LogRelay:
    """Forwards new lines of a running stage's log to a logger, at most `_MAX_LINES` at once.

    Attributes:
        get_logger: Called for each message, since Prefect's logger belongs to the current task.
    """

    def __init__(self, get_logger: Callable[[], AnyLogger]) -> None:
        self.get_logger = get_logger
        self._log = Path()
        self._offset = 0
        self._next = 0.0

    def stage_started(self, stage: str, key: str, work: Path) -> None:
        """Start after the lines of earlier attempts."""
        self._log = work / RECORD / "log.txt"
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        self.get_logger().info("%s starts, log: %s", stage, self._log)

    def stage_progress(self, stage: str, progress: dict[str, Any]) -> None:
        """Forward new lines, at most every `_PERIOD_S` seconds."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _PERIOD_S
            self._relay()

    def stage_finished(self, result: StageResult) -> None:
        """Forward the remaining lines; the log has moved with the artifact."""
        if result.state == "ran":
            self._log = result.path / RECORD / "log.txt"
            self._relay()

    def stage_failed(self, stage: str, error: BaseException) -> None:
        """Forward the remaining lines."""
        self._relay()

    def _relay(self) -> None:
        try:
            with self._log.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except OSError:  # not written yet
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.decode(errors="replace").splitlines()
        if len(lines) > _MAX_LINES:
            self.get_logger().info("(%d lines left out)", len(lines) - _MAX_LINES)
        for line in lines[-_MAX_LINES:]:
            self.get_logger().info("%s", line)
