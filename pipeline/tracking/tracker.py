"""Records the events of a run in journals, for servers that show it. A run never waits for a server while it works.

A thread sends each journal. Events that are not sent, because the server is slow or down or the process is killed, stay
in the journal. The next run or `dpar mlflow sync` sends them.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conf.runtime import RuntimeConfig
from pipeline.runner import Observer, StageResult, tally
from pipeline.servers import mlflow_uri, server_folder
from pipeline.tracking.journal import Journal, unfinished
from pipeline.tracking.sender import Sender, Watch, send_rest
from pipeline.tracking.view import Server, View, first_line, require_usable
from stages.runtime.artifact import RECORD
from stages.runtime.errors import InputError

logger = logging.getLogger(__name__)
_SQLITE = "sqlite:///"
_FILE_S = 45.0  # to write the remaining events into a file here, including the import of MLflow


@dataclass(frozen=True)
class RunStart:
    """What servers are told of a run at its start."""

    name: str
    tags: dict[str, str]
    settings: dict[str, Any]
    parameters: dict[str, Any] = field(default_factory=dict)
    """Parameters of the flow."""
    inputs: dict[str, list[str]] = field(default_factory=dict)
    """Stages of the run that each stage of the run reads."""
    notes: list[tuple[int, str]] = field(default_factory=list)
    """Lines for the run's log, each with its level."""
    flow_run_id: str | None = None
    """ID of the flow run if Prefect has started this run; else None."""
    identity: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    """Tag that all servers show for this run."""


class Tracker:
    """Observer that records a run in a journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._ends: list[str] = []
        self._failure: BaseException | None = None

    def begin(self, start: RunStart) -> None:
        """Record what the run is."""
        self._record("pipeline_started", **asdict(start))

    def end(self, error: BaseException | None) -> None:
        """Record how the run ended."""
        error = error or self._failure
        message = str(error) if error is not None else tally(self._ends)
        self._record("pipeline_finished", **_status(error), message=message)

    def stage_waiting(self, stage: str, message: str) -> None:
        """Record that another process makes the artifact."""
        self._record("stage_waiting", stage=stage, message=message)

    def stage_started(self, stage: str, key: str, work: Path) -> None:
        """Record the start, and where the lines of this attempt begin in the log."""
        log = work / RECORD / "log.txt"
        size = log.stat().st_size if log.exists() else 0
        self._record("stage_started", stage=stage, key=key, work=str(work), log_bytes=size)

    def stage_progress(self, stage: str, progress: dict[str, Any]) -> None:
        """Nothing: servers are sent metrics.jsonl and the log."""

    def stage_finished(self, result: StageResult) -> None:
        """Record the end of a stage."""
        self._ends.append(result.outcome)
        fields = {"stage": result.stage, "key": result.key, "state": result.state, "metrics": result.metrics}
        ends = {"path": str(result.path), "digest": result.digest, "duration_s": result.duration_s}
        self._record("stage_finished", **fields, **ends)

    def stage_failed(self, stage: str, error: BaseException) -> None:
        """Record that a stage failed. Another attempt at the same key continues it."""
        self._failure = error
        self._record("stage_failed", stage=stage, **_status(error), message=str(error))

    def _record(self, kind: str, **fields: Any) -> None:
        """Append an event. On a full disk it is dropped: an observer must not raise, and the stage reports the disk."""
        try:
            self._journal.append(kind, **fields)
        except OSError as error:
            logger.warning("an event of the run could not be written and is lost: %s", error)


@contextmanager
def recorded(start: RunStart, servers: Sequence[Server]) -> Iterator[list[Observer]]:
    """Record a run for servers, and send it while it goes on. Yields the observers to notify.

    No error of a server or of the journals' disk reaches the run. At the end it waits for servers that answer, for as
    long as the `close_s` of the most patient.
    """
    opened = [(server, journal) for server in servers if (journal := _new_journal(server)) is not None]
    trackers = [Tracker(journal) for _, journal in opened]
    senders = [Sender(server, journal) for server, journal in opened]
    watch = Watch(senders)
    for tracker in trackers:
        tracker.begin(start)
    for thread in (*senders, watch):
        thread.start()
    error: BaseException | None = None
    try:
        yield list(trackers)
    except BaseException as raised:
        error = raised
        raise
    finally:
        for tracker in trackers:
            tracker.end(error)
        _finish(senders)
        watch.end()


def _new_journal(server: Server) -> Journal | None:
    """A journal for this run; None, with a warning, if it cannot be written."""
    try:
        journal = Journal(server.journals / str(time.time_ns()))
    except OSError as error:
        logger.warning("%s is not told about this run, its journal cannot be written: %s", server.name, error)
        return None
    journal.lock()
    return journal


def _finish(senders: Sequence[Sender]) -> None:
    for sender in senders:
        sender.end()
    start = time.monotonic()
    for sender in senders:
        if not sender.wait(time.monotonic() - start) and not sender.damaged:
            server = sender.server
            logger.warning(
                "%s (%s) did not receive all events of this run (%s): send the rest with %s",
                *(server.name, server.address, sender.reason, server.later),
            )


def mlflow_server(runtime: RuntimeConfig) -> Server:
    """The MLflow store of these settings."""
    uri, folder = mlflow_uri(runtime), server_folder(runtime)
    if runtime.tracking_uri is None:
        database: Path | None = folder / "mlflow.db"
    else:
        database = Path(uri.removeprefix(_SQLITE)).absolute() if uri.startswith(_SQLITE) else None

    def prepare() -> None:
        from pipeline.tracking import mlflow_view

        if runtime.tracking_uri is None and database is not None:
            mlflow_view.create_database(database)

    def connect() -> View:
        from pipeline.tracking.mlflow_view import MlflowView

        if database is not None:
            require_usable(database)
        return MlflowView(uri, folder)

    return Server(
        name="MLflow",
        address=uri,
        journals=folder / "tracking",
        later="`dpar mlflow sync` or the next run",
        prepare=prepare,
        connect=connect,
        close_s=15.0 if database is None else _FILE_S,
    )


def sync(runtime: RuntimeConfig) -> int:
    """Send all unsent events to MLflow; returns the number of runs that had some.

    Raises:
        InputError: MLflow does not accept them.
    """
    server = mlflow_server(runtime)
    journals = unfinished(server.journals)
    if not journals:
        return 0
    try:
        server.prepare()
        view = server.connect()
        for journal in journals:
            send_rest(view, journal)
    except Exception as error:
        raise InputError(
            f"MLflow ({server.address}) does not accept the runs in {server.journals}: {first_line(error)}"
        ) from error
    finally:
        for journal in journals:
            journal.close()
    return len(journals)


def _status(error: BaseException | None) -> dict[str, Any]:
    """How a run or stage ended. Ctrl-C and cancellation, which are not an `Exception`, stop it from outside."""
    if error is None:
        return {"status": "FINISHED"}
    if isinstance(error, Exception):
        return {"status": "FAILED"}
    return {"status": "KILLED", "crashed": not isinstance(error, KeyboardInterrupt)}
