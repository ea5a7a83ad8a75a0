"""Journal of a run: events are written to disk before they are sent to MLflow.

No event is lost if the server is down or the process is killed.

home/.servers/tracking/<time>/events.jsonl   one event per line; locked by the process that writes it
home/.servers/tracking/<time>/state.json     how many events MLflow has received
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from stages.runtime.artifact import read_json, write_json

Event = dict[str, Any]
_EVENTS, _STATE = "events.jsonl", "state.json"


class Journal:
    """Events of one run, and how many have been sent. The folder is removed when all are sent.

    Attributes:
        folder: Folder of the journal.
        sent: Number of events that MLflow has received.
        run_id: ID of the MLflow run; None until it is created.
        running: Key and work folder of each stage whose end has not been sent.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = (folder / _EVENTS).open("a+", encoding="utf-8")
        state = read_json(folder / _STATE) if (folder / _STATE).exists() else {}
        self.sent: int = state.get("sent", 0)
        self.run_id: str | None = state.get("run_id")
        self.running: dict[str, dict[str, str]] = state.get("running", {})

    def lock(self) -> bool:
        """Lock the journal for this process; False if another process holds the lock."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def append(self, kind: str, **fields: Any) -> None:
        """Add an event."""
        event = {"event": kind, "time_ms": time.time_ns() // 1_000_000, **fields}
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    def unsent(self) -> list[Event]:
        """Events not sent yet, oldest first. A line cut off by a kill is ignored."""
        lines = (self.folder / _EVENTS).read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines[self.sent :]]

    def complete(self) -> None:
        """Append the events that a killed process could not write: its stages and its run were killed."""
        path = self.folder / _EVENTS
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not events or events[-1]["event"] == "pipeline_finished":
            return
        started = [event["stage"] for event in events if event["event"] == "stage_started"]
        ended = {event["stage"] for event in events if event["event"] in ("stage_finished", "stage_failed")}
        for stage in started:
            if stage not in ended:
                self.append("stage_failed", stage=stage, status="KILLED", message="the run was killed")
        self.append("pipeline_finished", status="KILLED")

    def save(self) -> None:
        """Write state.json."""
        write_json(self.folder / _STATE, {"sent": self.sent, "run_id": self.run_id, "running": self.running})

    def close(self) -> None:
        """Close the file and release the lock."""
        self._file.close()

    def remove(self) -> None:
        """Close the journal and remove its folder."""
        self.close()
        shutil.rmtree(self.folder)


def unfinished(root: Path) -> list[Journal]:
    """Journals of dead processes, oldest first, locked for this process."""
    found = []
    for folder in sorted(path for path in root.glob("*") if (path / _EVENTS).exists()):
        journal = Journal(folder)
        if journal.lock():
            found.append(journal)
        else:
            journal.close()
    return found
