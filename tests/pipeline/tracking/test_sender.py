"""A run is told what its servers do, and waits for none of them. The servers here are threads of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.runner import StageResult
from pipeline.tracking import sender
from pipeline.tracking.journal import Journal
from pipeline.tracking.tracker import RunStart, recorded
from pipeline.tracking.view import Server, StoreError

START = RunStart(name="tiny", tags={}, settings={})


class Page:
    """A server that keeps the kinds of events it receives; it can be told to fail or to hang."""

    def __init__(self, folder: Path, name: str = "Page") -> None:
        self.received: list[str] = []
        self.up, self.free = True, threading.Event()
        self.free.set()
        self.error: Exception = ConnectionError("refused\nat length")
        self.server = Server(name, "http://page", folder / name, "`dpar up`", lambda: None, lambda: self)

    def ping(self) -> None:
        self.free.wait(20)
        if not self.up:
            raise self.error

    def send(self, journal: Journal, on_sent: Callable[[], None]) -> None:
        for event in journal.unsent():
            self.ping()
            self.received.append(event["event"])
            journal.sent += 1
            journal.save()
            on_sent()

    def journals(self) -> list[Path]:
        return sorted(self.server.journals.glob("*"))


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Page:
    """A page, and senders whose seconds are a twentieth."""
    for name in ("PERIOD_S", "PAUSE_S", "PATIENCE_S", "START_S", "_LAST_TRY_S", "_FIRST_PAUSE_S"):
        monkeypatch.setattr(sender, name, getattr(sender, name) / 20)
    return Page(tmp_path)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_that_answers_gets_all_and_nothing_is_left(page: Page, caplog: pytest.LogCaptureFixture) -> None:
    with recorded(START, [page.server]) as (tracker,):
        tracker.stage_finished(StageResult("train", "cached", "train-1", Path("/x"), "", {}, 1.0))
    assert page.received == ["pipeline_started", "stage_finished", "pipeline_finished"]
    assert page.journals() == []
    assert caplog.messages == []


def test_a_server_that_goes_and_comes_back_is_said_once_each_and_gets_all(
    page: Page, caplog: pytest.LogCaptureFixture
) -> None:
    with recorded(START, [page.server]):
        wait_for(lambda: page.received)
        page.up = False
        wait_for(lambda: caplog.messages)
        time.sleep(0.5)
        page.up = True
        wait_for(lambda: len(caplog.messages) > 1)
    assert page.received == ["pipeline_started", "pipeline_finished"]
    assert caplog.messages == [
        "Page (http://page) does not answer: refused: going on without it, what it misses is sent by `dpar up`",
        "Page (http://page) answers again",
    ]


def test_servers_that_hang_or_fail_cost_one_bound_together_and_the_next_run_catches_up(
    page: Page, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Page(tmp_path, "Other")
    page.free.clear()
    other.up = False
    start = time.monotonic()
    with recorded(START, [page.server, other.server]) as trackers:
        for tracker in trackers:
            tracker.stage_failed("train", RuntimeError("the stage's own error"))
        begun = time.monotonic() - start
    assert begun < 0.2  # the run does not wait
    assert time.monotonic() - start < sender.PATIENCE_S + 0.5
    assert [message for message in caplog.messages if "did not receive all events" in message] == [
        "Page (http://page) did not receive all events of this run (still starting): send the rest with `dpar up`",
        "Other (http://page) did not receive all events of this run (refused): send the rest with `dpar up`",
    ]
    page.free.set()
    wait_for(lambda: not any(thread.name.endswith("-sender") for thread in threading.enumerate()))
    other.up, other.received = True, []
    with recorded(START, [other.server]):
        pass
    both = ["pipeline_started", "stage_failed", "pipeline_finished", "pipeline_started", "pipeline_finished"]
    assert other.received == both
    assert other.journals() == []


def test_what_waiting_does_not_mend_is_said_at_once(page: Page, caplog: pytest.LogCaptureFixture) -> None:
    page.up, page.error = False, StoreError("x.db is damaged")
    with recorded(START, [page.server]):
        start = time.monotonic()
        wait_for(lambda: caplog.messages)
        assert time.monotonic() - start < sender.PATIENCE_S
    assert "does not answer: x.db is damaged: going on" in caplog.messages[0]


def test_a_disk_that_takes_no_journal_costs_the_view_and_not_the_run(
    page: Page, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "Page").write_text("where the folder should be")
    with recorded(START, [page.server]) as trackers:
        assert trackers == []
    (line,) = caplog.messages
    assert line.startswith("Page is not told about this run, its journal cannot be written: ")


def test_damaged_journals_are_set_aside_and_do_not_keep_later_runs_from_the_server(
    page: Page, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = Journal(page.server.journals / "0")
    old.close()
    (old.folder / "events.jsonl").write_text('{"event": "stage_painted"}\n')
    with recorded(START, [page.server]):
        pass
    assert page.received == ["pipeline_started", "pipeline_finished"]
    (line,) = caplog.messages
    assert "written by another version" in line
    assert (tmp_path / "Page-damaged" / "0").is_dir()


def test_a_journal_damaged_during_its_own_run_ends_only_the_view(
    page: Page, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with recorded(START, [page.server]) as (tracker,):
        wait_for(lambda: page.received)
        (folder,) = page.journals()
        with (folder / "events.jsonl").open("ab") as file:
            file.write(b"\xff\n")
        tracker.stage_failed("train", RuntimeError("x"))
        wait_for(lambda: caplog.messages)
    (line,) = caplog.messages
    assert "is damaged and was moved" in line


@pytest.mark.parametrize(
    ("error", "status", "crashed"),
    [(None, "FINISHED", None), (OSError(), "FAILED", None), (KeyboardInterrupt(), "KILLED", False),
     (SystemExit(143), "KILLED", True)],
)  # fmt: skip
def test_the_journal_says_how_the_run_ended(
    page: Page, error: BaseException | None, status: str, crashed: bool | None
) -> None:
    page.up = False

    def run() -> None:
        with recorded(START, [page.server]):
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    (folder,) = page.journals()
    end = Journal(folder).events()[-1]
    assert (end["event"], end["status"], end.get("crashed")) == ("pipeline_finished", status, crashed)
