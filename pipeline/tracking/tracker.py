"""Tracking of runs in MLflow without waiting for it.

The tracker writes events to a journal, and a thread sends them. Events that are not sent, because MLflow is slow or
down or the process is killed, stay in the journal. The next run or `dpar mlflow sync` sends them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.runner import StageResult
from pipeline.servers import mlflow_uri, server_folder
from pipeline.tracking.journal import Journal, unfinished
from stages.runtime.errors import InputError

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_view import MlflowView

logger = logging.getLogger(__name__)
_PERIOD_S = 2.0
_PAUSE_S = 30.0  # before a retry, after MLflow failed
_CLOSE_S = 45.0  # for remaining events at the end, including the import of MLflow


class Tracker:
    """Observer that records a run in MLflow: one run for the pipeline, and a nested run for each stage that ran."""

    def __init__(self, settings: Settings, runtime: RuntimeConfig, *, name: str, tags: dict[str, str]) -> None:
        self._settings, self._runtime = settings, runtime
        self._name, self._tags = name, tags
        self._journal = Journal(_root(runtime) / str(time.time_ns()))
        self._journal.lock()
        self._failed = False
        self._sender = _Sender(self._journal, runtime)

    def __enter__(self) -> Self:
        settings = self._settings.model_dump(mode="json")
        self._record("pipeline_started", name=self._name, tags=self._tags, settings=settings)
        self._sender.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = self._failed or error is not None
        status = "KILLED" if _stopped(error) else "FAILED" if failed else "FINISHED"
        self._record("pipeline_finished", status=status)
        if not self._sender.finish(_CLOSE_S):
            uri = mlflow_uri(self._runtime)
            logger.warning(
                "MLflow (%s) did not receive all events of this run: send the rest with `dpar mlflow sync`", uri
            )

    def stage_started(self, stage: str, key: str, work: Path) -> None:
        """Open the stage's run, or continue the run of a killed attempt."""
        self._record("stage_started", stage=stage, key=key, work=str(work))

    def stage_progress(self, stage: str, progress: dict[str, Any]) -> None:
        """Nothing: the sender reads metrics.jsonl itself."""

    def stage_finished(self, result: StageResult) -> None:
        """Close the stage's run, or link to the run that made its artifact."""
        fields = {"stage": result.stage, "key": result.key, "state": result.state, "metrics": result.metrics}
        self._record("stage_finished", **fields, path=str(result.path), digest=result.digest)

    def stage_failed(self, stage: str, error: BaseException) -> None:
        """Close the stage's run as failed. Another attempt at the same key continues it."""
        self._failed = True
        status = "KILLED" if _stopped(error) else "FAILED"
        self._record("stage_failed", stage=stage, status=status, message=str(error))

    def _record(self, kind: str, **fields: Any) -> None:
        """Append an event. On a full disk it is dropped: an observer must not raise, and the stage reports the disk."""
        try:
            self._journal.append(kind, **fields)
        except OSError as error:
            logger.warning("an event for MLflow could not be written and is lost: %s", error)


def sync(runtime: RuntimeConfig) -> int:
    """Send all unsent events to MLflow; returns the number of runs that had some.

    Raises:
        InputError: MLflow does not accept them.
    """
    journals = unfinished(_root(runtime))
    if not journals:
        return 0
    try:
        view = _open_view(runtime)
        for journal in journals:
            _send_rest(view, journal)
    except Exception as error:
        raise InputError(
            f"MLflow ({mlflow_uri(runtime)}) does not accept the runs in {_root(runtime)}: {_first_line(error)}"
        ) from error
    finally:
        for journal in journals:
            journal.close()
    return len(journals)


class _Sender(threading.Thread):
    """Thread that sends a journal while it grows. Only this thread calls MLflow, and no error of MLflow ends it."""

    def __init__(self, journal: Journal, runtime: RuntimeConfig) -> None:
        super().__init__(name="mlflow-sender", daemon=True)
        self._journal, self._runtime = journal, runtime
        self._ending = threading.Event()
        self._view: MlflowView | None = None
        self._sent_all = False

    def finish(self, timeout_s: float) -> bool:
        """Send the remaining events within a timeout; returns whether all were sent."""
        self._ending.set()
        self.join(timeout_s)
        return self._sent_all

    def run(self) -> None:
        """Send every `_PERIOD_S` seconds, or `_PAUSE_S` after a failure, and once more at the end."""
        pause = 0.0
        while not self._ending.wait(pause):
            pause = _PERIOD_S if self._try_to_send() else _PAUSE_S
        self._sent_all = self._try_to_send()
        if self._sent_all:
            self._journal.remove()
        else:
            self._journal.close()

    def _try_to_send(self) -> bool:
        try:
            if self._view is None:
                self._view = _open_view(self._runtime)
                self._send_left_behind(self._view)
            self._view.send(self._journal)
        except Exception as error:
            logger.info("MLflow (%s) does not answer: %s", mlflow_uri(self._runtime), _first_line(error))
            return False
        return True

    def _send_left_behind(self, view: MlflowView) -> None:
        """Send the journals of killed runs first: a stage that resumes now must not be marked as killed later."""
        for journal in unfinished(self._journal.folder.parent):
            with contextlib.closing(journal):
                try:
                    _send_rest(view, journal)
                except Exception as error:  # a journal that MLflow always rejects must not block this run
                    logger.warning("MLflow does not accept %s: %s", journal.folder, _first_line(error))


def _send_rest(view: MlflowView, journal: Journal) -> None:
    """Send the whole journal of a dead process and remove it."""
    journal.complete()
    view.send(journal)
    journal.remove()


def _open_view(runtime: RuntimeConfig) -> MlflowView:
    """Import MLflow, which takes seconds, and open its store."""
    from pipeline.tracking.mlflow_view import MlflowView

    return MlflowView(mlflow_uri(runtime), server_folder(runtime))


def _root(runtime: RuntimeConfig) -> Path:
    return server_folder(runtime) / "tracking"


def _stopped(error: BaseException | None) -> bool:
    """Whether a run was stopped from outside: Ctrl-C and cancellation are not an `Exception`."""
    return error is not None and not isinstance(error, Exception)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
