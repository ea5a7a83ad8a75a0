"""Writes the events of a journal to a Prefect server.

A run is a flow run, and each of its stages a task run. Prefect does not run them, so none of its errors can end them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid5

from pipeline.serving.log_tail import LogTail
from pipeline.serving.prefect_api import PrefectApi
from pipeline.tracking.journal import Event, Journal, JournalError, require_valid

FLOW = "dpar-pipeline"
State = dict[str, str]
_FINAL = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
_LONGEST = 10_000  # characters of a message
_LATE_S = 60.0  # a state that reaches Prefect later than this has its time in its message


class PrefectView:
    """Writes journals to a Prefect server.

    Args:
        api_url: URL of its API.
        store: What identifies its database; a temporary server has another port each time.
        auth: Its login, see `PrefectApi`.
    """

    def __init__(self, api_url: str, store: str, auth: str | None = None) -> None:
        self._api, self._store = PrefectApi(api_url, auth), store

    def ping(self) -> None:
        """Ask the server whether it is there and accepts our login."""
        version = self._api.get("/admin/version")
        if not isinstance(version, str):
            raise ValueError(f"it answers {version!r}, expected Prefect's version: is this Prefect's API?")

    def send(self, journal: Journal, on_sent: Callable[[], None]) -> None:
        """Send the unsent events of a journal, and new lines of the running stage's log.

        Raises:
            JournalError: The journal is damaged.
            OSError, ValueError, LookupError, KeyError: The server does not answer, refuses, or answers nonsense.
        """
        self._api.on_answer = on_sent
        if journal.run_id is not None and journal.unsent() and not self._has(journal):
            self._begin_anew(journal)
        for event in journal.unsent():
            require_valid(event)
            self._apply(journal, event)
            journal.sent += 1
            journal.save()
        for stage, place in journal.running.items():
            self._follow(journal, stage, Path(place["work"]))

    def _has(self, journal: Journal) -> bool:
        return self._api.get(f"/flow_runs/{_flow_run(journal)}") is not None

    def _begin_anew(self, journal: Journal) -> None:
        """Send all of a run whose flow run has gone with its database, or was deleted on the page.

        Raises:
            LookupError: The flow run is on another server.
        """
        if journal.store != self._store:
            raise LookupError(f"its flow run {journal.run_id} is on another server, {journal.store}")
        started_by_prefect = journal.events()[0].get("flow_run_id") is not None
        journal.restart()
        if started_by_prefect:
            journal.sent = len(journal.events())  # there is no flow run to show it in
            journal.save()

    def _apply(self, journal: Journal, event: Event) -> None:
        """Apply one event. Each can be repeated after it failed half way."""
        match event["event"]:
            case "pipeline_started":
                self._pipeline_started(journal, event)
            case "stage_waiting":
                self._set_task(journal, event, _state("PENDING", event["message"]))
                self._log(journal, event["stage"], [(logging.WARNING, event["message"])])
            case "stage_started":
                self._stage_started(journal, event)
            case "stage_finished" | "stage_failed":
                self._stage_ended(journal, event)
            case "pipeline_finished":
                self._pipeline_finished(journal, event)

    def _pipeline_started(self, journal: Journal, event: Event) -> None:
        if event.get("flow_run_id") is not None:
            journal.run_id = event["flow_run_id"]
        else:
            flow = self._api.post("/flows/", {"name": FLOW})
            run = {
                "flow_id": flow["id"],
                "name": event["name"],
                "parameters": event.get("parameters", {}),
                "tags": [event["identity"]],
                "idempotency_key": event["identity"],
                "state": _state("RUNNING"),
            }
            journal.run_id = self._api.post("/flow_runs/", run)["id"]
        journal.store = self._store
        journal.save()
        self._log(journal, None, event.get("notes", []))

    def _stage_started(self, journal: Journal, event: Event) -> None:
        stage, work = event["stage"], Path(event["work"])
        self._set_task(journal, event, _state("RUNNING"))
        self._log(journal, stage, [(logging.INFO, f"{stage} starts, log: {LogTail.path(work)}")])
        journal.running[stage] = {"key": event["key"], "work": str(work), "log_bytes": event.get("log_bytes", 0)}

    def _stage_ended(self, journal: Journal, event: Event) -> None:
        stage = event["stage"]
        if stage in journal.running:
            self._follow(journal, stage, Path(event.get("path", journal.running[stage]["work"])))
        else:
            self._set_task(journal, event, _state("RUNNING"))  # gives a cached stage its start time
        self._set_task(journal, event, _task_end(event))
        journal.running.pop(stage, None)

    def _pipeline_finished(self, journal: Journal, event: Event) -> None:
        """Set the flow run's last state, unless Prefect runs the flow itself: then only if its process was killed."""
        path = f"/flow_runs/{_flow_run(journal)}"
        if journal.events()[0].get("flow_run_id") is not None:
            known = self._api.get(path)
            if not event.get("crashed") or known is None or known["state_type"] in _FINAL:
                return
        self._api.post(f"{path}/set_state", {"state": _late(_end(event), event), "force": True})

    def _set_task(self, journal: Journal, event: Event, state: State) -> None:
        """Create the task run of a stage, if it does not exist, and set its state."""
        run_id, stage = _flow_run(journal), event["stage"]
        read = journal.events()[0].get("inputs", {}).get(stage, [])
        task = {
            "id": str(_task_run(run_id, stage)),
            "name": stage,
            "flow_run_id": str(run_id),
            "task_key": f"dpar.{stage}",
            "dynamic_key": "0",
            "state": _state("PENDING"),
            "task_inputs": {"wait_for": [{"input_type": "task_run", "id": str(_task_run(run_id, it))} for it in read]},
        }
        created = self._api.post("/task_runs/", task)
        self._api.post(f"/task_runs/{created['id']}/set_state", {"state": _late(state, event), "force": True})

    def _follow(self, journal: Journal, stage: str, folder: Path) -> None:
        """Send new lines of a stage's log."""
        place = journal.running[stage]
        lines, end = LogTail(folder, place["log_bytes"]).lines()
        if lines:
            self._log(journal, stage, [(logging.INFO, line) for line in lines])
            place["log_bytes"] = end
            journal.save()

    def _log(self, journal: Journal, stage: str | None, lines: Iterable[tuple[int, str]]) -> None:
        """Add lines, each with its level, to the log of the flow run or of a stage's task run."""
        run_id = _flow_run(journal)
        log = {"name": "dpar", "flow_run_id": str(run_id), "timestamp": datetime.now(UTC).isoformat()}
        if stage is not None:
            log["task_run_id"] = str(_task_run(run_id, stage))
        self._api.post("/logs/", [log | {"level": level, "message": line[:_LONGEST]} for level, line in lines])


def _flow_run(journal: Journal) -> UUID:
    try:
        return UUID(journal.run_id)
    except (TypeError, ValueError, AttributeError) as error:
        raise JournalError(f"{journal.folder} has no flow run: its first event is not pipeline_started") from error


def _task_run(flow_run: UUID, stage: str) -> UUID:
    """ID of a stage's task run, known without asking."""
    return uuid5(flow_run, stage)


def _state(kind: str, message: str = "", name: str | None = None) -> State:
    return {"type": kind, "message": message[:_LONGEST], "name": name or kind.capitalize()}


def _task_end(event: Event) -> State:
    """Last state of a task run."""
    if event["event"] == "stage_failed":
        return _end(event)
    if event["state"] == "ran":
        return _state("COMPLETED", f"{event['key']} made in {event.get('duration_s', 0):.0f} s")
    return _state("COMPLETED", f"{event['key']} reused", name="Cached")


def _end(event: Event) -> State:
    """Last state of a flow run or task run that ended with a status."""
    message = str(event.get("message", ""))
    match event["status"]:
        case "FINISHED":
            return _state("COMPLETED", message)
        case "FAILED":
            return _state("FAILED", message)
        case _:
            return _state("CRASHED", message) if event.get("crashed") else _state("CANCELLED", message or "interrupted")


def _late(state: State, event: Event) -> State:
    """Add to the message of a state when it was reached, if Prefect hears of it much later."""
    if time.time() - event["time_ms"] / 1000 < _LATE_S:
        return state
    reached = datetime.fromtimestamp(event["time_ms"] / 1000).astimezone().isoformat(sep=" ", timespec="seconds")
    return state | {"message": f"{state['message'] or state['name']}, at {reached}"}
