"""A run ends well and with its artifacts whatever Prefect does. The stages, servers and faults are real."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import wait_for

from pipeline.launch import StageFailed
from pipeline.processes import HOST, free_port
from pipeline.serving.local import run_pipeline
from pipeline.tracking import sender
from pipeline.tracking.journal import Journal

pytestmark = pytest.mark.slow
Run = Callable[..., float]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new home, a run that waits three seconds for a server, and the environment as it was afterwards."""
    monkeypatch.setattr(sender, "PATIENCE_S", 3.0)
    monkeypatch.setattr(sender, "PAUSE_S", 0.5)
    before = dict(os.environ)
    yield tmp_path / "home"
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def run(home: Path, image_root: Path) -> Run:
    """Run stage `dataset` in this process; gives the seconds that it took."""

    def run(*overrides: str) -> float:
        start = time.monotonic()
        given = [f"dataset.root={image_root}", f"runtime.home={home}", "runtime.tracking=false", *overrides]
        run_pipeline("tiny", None, given, until_stage="dataset")
        return time.monotonic() - start

    return run


def journals(home: Path) -> list[list[dict[str, Any]]]:
    return [Journal(folder).events() for folder in sorted((home / ".servers" / "flow-runs").glob("*"))]


@contextmanager
def silent() -> Iterator[str]:
    """URL of a server that accepts and never answers."""
    with socket.create_server((HOST, 0)) as listening:
        yield f"http://{HOST}:{listening.getsockname()[1]}/api"


@contextmanager
def closed() -> Iterator[str]:
    yield f"http://{HOST}:{free_port()}/api"


FAULTS = {"closed": closed, "silent": silent}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_without_prefect_ends_well_and_says_so(
    fault: str, run: Run, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with FAULTS[fault]() as url:
        monkeypatch.setenv("PREFECT_API_URL", url)
        assert run() < 40
    assert list(home.glob("dataset/*/manifest.json"))
    assert f"Prefect ({url}) did not receive all events of this run" in caplog.messages[-1]
    ((*_, made, end),) = journals(home)
    assert (made["stage"], made["state"], end["status"]) == ("dataset", "ran", "FINISHED")


def test_an_error_of_the_stage_stays_its_own_without_prefect(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "broken.png").write_bytes(b"no image")
    with closed() as url:
        monkeypatch.setenv("PREFECT_API_URL", url)
        with pytest.raises(StageFailed) as failed:
            run(f"dataset.root={tmp_path / 'images'}")
    assert failed.value.code == 2


def test_a_damaged_database_of_prefect_is_named_and_left_alone(
    run: Run, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = home / ".servers" / "prefect" / "prefect.db"
    database.parent.mkdir(parents=True)
    database.write_bytes(b"damaged!" * 1000)
    run()
    assert f"does not answer: {database} is damaged (" in caplog.messages[0]
    assert database.read_bytes() == b"damaged!" * 1000
    assert list(home.glob("dataset/*/manifest.json"))


def test_a_folder_that_takes_no_server_files_costs_the_views_and_not_the_run(
    run: Run, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home.mkdir()
    (home / ".servers").write_text("where the folder should be")
    run("runtime.tracking=true")
    assert list(home.glob("dataset/*/manifest.json"))
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "Prefect's server does not start",
        "MLflow is not told about this run, its journal cannot be written",
    ]


@pytest.mark.timeout(300)
def test_a_server_that_stalls_and_dies_in_the_middle_interrupts_no_stage(
    run: Run, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[float] = []

    def strike() -> None:
        """Hold the stage until Prefect knows of it, stall the server, wake it, kill it, and let the stage go."""
        stage = wait_for(lambda: child("stages.dataset"))
        stage.suspend()
        wait_for(lambda: list(home.glob(".servers/flow-runs/*/state.json")))
        server = wait_for(lambda: child("prefect"))
        for hit, words in ((server.suspend, "does not answer"), (server.resume, "again"), (server.kill, "answer: ")):
            caplog.clear()
            start = time.monotonic()
            hit()
            wait_for(lambda words=words: words in caplog.text)
            said.append(time.monotonic() - start)
        stage.resume()

    thread = threading.Thread(target=strike)
    thread.start()
    run()
    thread.join()
    assert list(home.glob("dataset/*/manifest.json"))
    assert max(said) < 15
    assert not child("prefect")


def child(word: str) -> psutil.Process | None:
    """A child process with a word in its command line."""
    for process in psutil.Process().children():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(word in part for part in process.cmdline()):
                return process
        except psutil.NoSuchProcess:
            continue
    return None
