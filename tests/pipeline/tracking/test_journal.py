import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.journal import Journal, JournalError, require_valid, unfinished

START = {"name": "x", "tags": {}, "settings": {}, "identity": "1"}


def test_sent_events_are_not_sent_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "1")
    journal.append("pipeline_started", name="a")
    journal.append("stage_started", stage="train")
    journal.sent, journal.run_id, journal.store = 1, "abc", "here"
    journal.save()
    journal.close()
    again = Journal(tmp_path / "1")
    assert [event["event"] for event in again.unsent()] == ["stage_started"]
    assert (again.run_id, again.store) == ("abc", "here")
    again.remove()
    assert not (tmp_path / "1").exists()


def test_a_journal_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    live = Journal(tmp_path / "1")
    live.append("pipeline_started")
    assert live.lock()
    assert unfinished(tmp_path) == []
    live.close()
    (found,) = unfinished(tmp_path)
    found.close()


def test_a_killed_process_is_completed_with_how_it_ended(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "1")
    for kind, stage in (
        ("pipeline_started", ""),
        ("stage_started", "a"),
        ("stage_finished", "a"),
        ("stage_started", "b"),
    ):
        journal.append(kind, stage=stage)
    journal.close()
    with (tmp_path / "1" / "events.jsonl").open("a") as file:
        file.write('{"event": "stage_fin')  # torn by the kill
    (found,) = unfinished(tmp_path)
    found.complete()
    ends = [(event["event"], event.get("stage"), event.get("status")) for event in found.unsent()[4:]]
    assert ends == [("stage_failed", "b", "KILLED"), ("pipeline_finished", None, "KILLED")]
    assert all(event["crashed"] for event in found.unsent()[4:])
    found.complete()
    assert len(found.unsent()) == 6
    found.close()


def test_an_event_that_a_full_disk_cut_off_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, write = Journal(tmp_path / "1"), os.write
    journal.append("stage_started", stage="a")
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda file, line: write(file, line[:9]))
        with pytest.raises(OSError, match=r"no space for an event in .*events\.jsonl"):
            journal.append("stage_started", stage="b")
    journal.append("stage_started", stage="c")
    assert [event["stage"] for event in journal.events()] == ["a", "c"]
    journal.close()


DAMAGED_STATES = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[]",
    b"null",
    b"{}",
    b'{"sent": "1", "run_id": null, "running": {}}',
    b'{"sent": -1, "run_id": null, "running": {}}',
    b'{"sent": 0, "run_id": 7, "running": {}}',
    b'{"sent": 0, "run_id": null, "running": []}',
    b'{"sent": 0, "run_id": null, "running": {"train": {}}}',
    b'{"sent": 0, "run_id": null, "running": {"train": {"key": 1, "work": "x"}}}',
]


@pytest.mark.parametrize("state", DAMAGED_STATES)
def test_a_journal_with_a_damaged_state_is_set_aside(
    tmp_path: Path, state: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "tracking"
    for name in ("1", "2"):
        journal = Journal(root / name)
        journal.append("pipeline_started", **START)
        journal.close()
    (root / "1" / "state.json").write_bytes(state)
    (whole,) = unfinished(root)
    assert whole.folder.name == "2"
    whole.close()
    assert (tmp_path / "tracking-damaged" / "1" / "state.json").read_bytes() == state
    (line,) = caplog.messages
    assert "is damaged and was moved to" in line
    assert "state.json" in line


NO_EVENTS = [b"{", b"\xff\xfe", b"7", b"[]", b"null", b"{}", b'{"event": "stage_painted"}', b'{"event": []}', b""]


@pytest.mark.parametrize("line", NO_EVENTS)
def test_a_line_that_is_no_event_is_an_error_with_its_place(tmp_path: Path, line: bytes) -> None:
    journal = Journal(tmp_path / "1")
    journal.append("pipeline_started", **START)
    with (tmp_path / "1" / "events.jsonl").open("ab") as file:
        file.write(line + b"\n")
    journal.append("pipeline_finished", status="FINISHED")
    with pytest.raises(JournalError, match=r"events\.jsonl"):
        journal.unsent()
    with pytest.raises(JournalError, match=r"events\.jsonl"):
        journal.complete()
    journal.close()


@pytest.mark.parametrize(
    "event",
    [
        {"event": "pipeline_started", "time_ms": 1, **START, "tags": None},
        {"event": "pipeline_finished", "time_ms": 1},
        {"event": "pipeline_finished", "status": "FINISHED"},
        {"event": "stage_started", "time_ms": 1, "stage": "train", "key": "train-1"},
        {"event": "stage_finished", "time_ms": "1", "stage": "train"},
    ],
)
def test_an_event_without_its_fields_is_an_error(event: dict[str, Any]) -> None:
    with pytest.raises(JournalError, match="expected"):
        require_valid(json.loads(json.dumps(event)))


def test_what_is_no_journal_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2" / "events.jsonl").mkdir(parents=True)
    (tmp_path / "3").touch()
    assert unfinished(tmp_path) == []
    (line,) = caplog.messages
    assert "2 cannot be opened, and is left alone" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]
