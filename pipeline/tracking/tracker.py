"""Runs recorded in MLflow without ever waiting for it.

The tracker writes events to a journal; a thread sends them. What MLflow does not take, because it is slow or dead or
this process is killed, stays in the journal, and the next run or `sync` sends it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from conf.schema import RuntimeConfig, Settings
from pipeline.runner import StageResult
from pipeline.servers import mlflow_uri, server_folder
from pipeline.tracking.journal import Journal, unfinished
from stages.runtime.errors import InputError

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_view import MlflowView

logger = logging.getLogger(__name__)
_PERIOD_S = 2.0
_PAUSE_S = 30.0  # after MLflow has failed, before it is asked again
_CLOSE_S = 45.0  # for the rest at the end, the import of MLflow included


class Tracker:
    """An observer that records a run: one MLflow run for the pipeline, one below it for each stage that really ran."""

    def __init__(self, settings: Settings, runtime: RuntimeConfig, *, name: str, tags: dict[str, str]) -> None:
        self._settings, self._runtime = settings, runtime
        self._name, self._tags = name, tags
        self._journal = Journal(_root(runtime) / str(time.time_ns()))
        self._journal.lock()
        self._failed = False
        self._sender = _Sender(self._journal, runtime)

    def __enter__(self) -> Self:
        settings = self._settings.model_dump(mode="json")
        self._tell("pipeline_started", name=self._name, tags=self._tags, settings=settings)
        self._sender.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = self._failed or error is not None
        status = "KILLED" if _stopped(error) else "FAILED" if failed else "FINISHED"
        self._tell("pipeline_finished", status=status)
        if not self._sender.finish(_CLOSE_S):
            uri = mlflow_uri(self._runtime)
            logger.warning("MLflow (%s) has not taken all of this run: `dpar mlflow sync` sends the rest", uri)

    def stage_started(self, stage: str, key: str, work: Path) -> None:
        """Open the stage's run, or go on in that of a killed attempt."""
        self._tell("stage_started", stage=stage, key=key, work=str(work))

    def stage_progress(self, stage: str, progress: dict[str, Any]) -> None:
        """The sender follows metrics.jsonl by itself."""

    def stage_finished(self, result: StageResult) -> None:
        """Close the stage's run, or link to the one that made its artifact."""
        fields = {"stage": result.stage, "key": result.key, "state": result.state, "metrics": result.metrics}
        self._tell("stage_finished", **fields, path=str(result.path), digest=result.digest)

    def stage_failed(self, stage: str, error: BaseException) -> None:
        """Close the stage's run as failed; another attempt at the same key goes on in it."""
        self._failed = True
        status = "KILLED" if _stopped(error) else "FAILED"
        self._tell("stage_failed", stage=stage, status=status, message=str(error))

    def _tell(self, kind: str, **fields: Any) -> None:
        """An observer must not raise: a full disk costs the view of the run, the stage itself says what is wrong."""
        try:
            self._journal.append(kind, **fields)
        except OSError as error:
            logger.warning("MLflow will not know of this: %s", error)


def sync(runtime: RuntimeConfig) -> int:
    """Send MLflow what it has missed; returns the number of runs that were behind.

    Raises:
        InputError: MLflow does not take it.
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
            f"MLflow ({mlflow_uri(runtime)}) does not take the runs that wait in {_root(runtime)}: {_first_line(error)}"
        ) from error
    finally:
        for journal in journals:
            journal.close()
    return len(journals)


class _Sender(threading.Thread):
    """Sends a journal while it grows. It alone touches MLflow, and it never ends because of it."""

    def __init__(self, journal: Journal, runtime: RuntimeConfig) -> None:
        super().__init__(name="mlflow-sender", daemon=True)
        self._journal, self._runtime = journal, runtime
        self._ending = threading.Event()
        self._view: MlflowView | None = None
        self._sent_all = False

    def finish(self, timeout_s: float) -> bool:
        """Send the rest, for so long at most; whether all was sent."""
        self._ending.set()
        self.join(timeout_s)
        return self._sent_all

    def run(self) -> None:
        """Send every few seconds; after a failure only every half minute, and once more at the end."""
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
        """First what killed runs could not send: a stage that goes on now must not be called killed afterwards."""
        for journal in unfinished(self._journal.folder.parent):
            with contextlib.closing(journal):
                try:
                    _send_rest(view, journal)
                except Exception as error:  # what MLflow refuses for good must not keep this run from it
                    logger.warning("MLflow does not take %s: %s", journal.folder, _first_line(error))


def _send_rest(view: MlflowView, journal: Journal) -> None:
    """Send all that a dead process has left behind."""
    journal.complete()
    view.send(journal)
    journal.remove()


def _open_view(runtime: RuntimeConfig) -> MlflowView:
    """MLflow takes seconds to import: only the thread that sends waits for it."""
    from pipeline.tracking.mlflow_view import MlflowView

    return MlflowView(mlflow_uri(runtime), server_folder(runtime))


def _root(runtime: RuntimeConfig) -> Path:
    return server_folder(runtime) / "tracking"


def _stopped(error: BaseException | None) -> bool:
    """Whether a person or the machine ended it: Ctrl-C and cancellation are no `Exception`."""
    return error is not None and not isinstance(error, Exception)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
