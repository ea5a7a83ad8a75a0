"""Journal of a run: its events, on disk before they are sent to a server.

No event is lost if the server is down or the process is killed. MLflow and Prefect have a folder of journals each:

home/.servers/tracking/<time>/     journals for MLflow
home/.servers/flow-runs/<time>/    journals for Prefect
  events.jsonl   one event per line; locked by the process that writes it
  state.json     how many events the server has received
home/.servers/<folder>-damaged/    journals that cannot be read, set aside
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from stages.runtime.artifact import read_json, write_json

logger = logging.getLogger(__name__)
Event = dict[str, Any]
_EVENTS, _STATE = "events.jsonl", "state.json"
_FIELDS: dict[str, dict[str, type]] = {
    "pipeline_started": {"name": str, "tags": dict, "settings": dict, "identity": str},
    "stage_waiting": {"stage": str, "message": str},
    "stage_started": {"stage": str, "key": str, "work": str},
    "stage_finished": {"stage": str, "key": str, "state": str, "metrics": dict, "path": str, "digest": str},
    "stage_failed": {"stage": str, "status": str, "message": str},
    "pipeline_finished": {"status": str},
}


class JournalError(ValueError):
    """A journal cannot be read: damaged, or written by another version."""


class Journal:
    """Events of one run, and how many have been sent. The folder is removed when all are sent.

    Attributes:
        folder: Folder of the journal.
        sent: Number of events that the server has received.
        run_id: ID of the server's run; None until it is created.
        store: Address of the server that created it; None if it is not known.
        running: Key, work folder and other notes of each stage whose end has not been sent.

    Raises:
        JournalError: state.json is damaged.
        OSError: The files cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.sent: int = 0
        self.run_id: str | None = None
        self.store: str | None = None
        self.running: dict[str, dict[str, Any]] = {}
        self._file = os.open(folder / _EVENTS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        path = self.folder / _STATE
        if not path.exists():
            return
        try:
            state = read_json(path)
            self.sent, self.run_id, self.store = state["sent"], state["run_id"], state.get("store")
            self.running = state["running"]
            places = [(place["key"], place["work"]) for place in self.running.values()]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise JournalError(f"{path} cannot be read: {error}") from error
        texts = [text for place in places for text in place] + [self.run_id or "", self.store or ""]
        if not isinstance(self.sent, int) or self.sent < 0 or not all(isinstance(text, str) for text in texts):
            raise JournalError(f"{path} has values of other types than dpar writes")

    def lock(self) -> bool:
        """Lock the journal for this process; False if another process holds the lock."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def append(self, kind: str, **fields: Any) -> None:
        """Add an event. On a full disk, nothing of it stays.

        Raises:
            OSError: It could not be written.
        """
        line = json.dumps({"event": kind, "time_ms": time.time_ns() // 1_000_000, **fields}).encode() + b"\n"
        end = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(f"no space for an event in {self.folder / _EVENTS}")
        except OSError:
            os.ftruncate(self._file, end)  # half a line would damage the next one
            raise

    def events(self) -> list[Event]:
        """All events, oldest first. A line cut off by a kill is ignored.

        Raises:
            JournalError: A line is no event.
        """
        path = self.folder / _EVENTS
        events = []
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                event = json.loads(line)
                known = event["event"] in _FIELDS
            except (ValueError, TypeError, KeyError) as error:
                raise JournalError(f"line {number} of {path} is no event: {error}") from error
            if not known:
                kind = event["event"]
                raise JournalError(f"{path} has an unknown event {kind!r}: it was written by another version of dpar")
            events.append(event)
        return events

    def unsent(self) -> list[Event]:
        """Events not sent yet, oldest first.

        Raises:
            JournalError: A line is no event.
        """
        return self.events()[self.sent :]

    def complete(self) -> None:
        """Append the events that a killed process could not write: its stages and its run were killed.

        Raises:
            JournalError: A line is no event.
        """
        path = self.folder / _EVENTS
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        events = self.events()
        if not events or events[-1]["event"] == "pipeline_finished":
            return
        ends = ("stage_finished", "stage_failed")
        started = dict.fromkeys(event["stage"] for event in events if event["event"] == "stage_started")
        ended = {event["stage"] for event in events if event["event"] in ends}
        killed = {"status": "KILLED", "crashed": True, "message": "the run was killed"}
        for stage in started:
            if stage not in ended:
                self.append("stage_failed", stage=stage, **killed)
        self.append("pipeline_finished", **killed)

    def save(self) -> None:
        """Write state.json."""
        state = {"sent": self.sent, "run_id": self.run_id, "store": self.store, "running": self.running}
        write_json(self.folder / _STATE, state)

    def restart(self) -> None:
        """Send all events again, as a new run: the server no longer has the old one."""
        self.sent, self.run_id, self.store, self.running = 0, None, None, {}
        self.save()

    def close(self) -> None:
        """Close the file and release the lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Close the journal and remove its folder. One that stays has nothing to send, and goes next time."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def require_valid(event: Event) -> None:
    """Check that an event has the fields of its kind.

    Raises:
        JournalError: It does not; it is damaged or was written by another version.
    """
    for name, kind in (_FIELDS[event["event"]] | {"time_ms": int}).items():
        if not isinstance(event.get(name), kind):
            raise JournalError(f"an event {event['event']} has {name} {event.get(name)!r}, expected {kind.__name__}")


def unfinished(root: Path) -> list[Journal]:
    """Journals of dead processes, oldest first, locked for this process. Damaged ones are set aside."""
    found = []
    for folder in sorted(root.glob("*")):
        if not (folder / _EVENTS).exists():
            continue
        try:
            journal = Journal(folder)
        except JournalError as error:
            set_aside(folder, error)
        except OSError as error:
            logger.warning("the journal %s cannot be opened, and is left alone: %s", folder, error)
        else:
            if journal.lock():
                found.append(journal)
            else:
                journal.close()
    return found


def set_aside(folder: Path, error: JournalError) -> None:
    """Move a damaged journal out of the way of later runs, and say so in one line."""
    aside = folder.parent.with_name(f"{folder.parent.name}-damaged") / folder.name
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
    except OSError as failure:
        logger.warning("the journal %s is damaged and cannot be moved (%s): %s", folder, failure, error)
        return
    logger.warning("the journal of a run is damaged and was moved to %s: %s", aside, error)
