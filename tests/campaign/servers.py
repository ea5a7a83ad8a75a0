"""Faults of the servers: no run may lose an artifact, hang, or hide that its record is incomplete."""

from __future__ import annotations

import contextlib
import http.server
import os
import resource
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from campaign.rows import Outcome, Row
from campaign.workplace import Run, Workplace

KIND = "servers"
_EXTRA_S = 120.0  # that a run with a fault may take longer than one without
_FILE_LIMIT = 64 * 1024  # bytes of a file on a disk that is full


@dataclass
class Fault:
    """What is wrong before and while a run works.

    Attributes:
        environment: Variables of the run.
        before: Called in its process before it starts.
        during: Called with the run after it has started.
        may_fail: Whether the run may fail, if the next one without the fault ends it.
    """

    environment: dict[str, str]
    before: Callable[[], None] | None = None
    during: Callable[[Run], None] | None = None
    may_fail: bool = False


def rows(place: Workplace, times: int, seed: int) -> Iterator[Row]:
    """One row for each fault; `times` and `seed` change nothing."""
    faults: dict[str, Callable[[Path], AbstractContextManager[Fault]]] = {
        "Prefect: closed port": lambda home: _address("PREFECT_API_URL", _closed_port(), "/api"),
        "Prefect: black hole": lambda home: _served("PREFECT_API_URL", _black_hole, "/api"),
        "Prefect: rubbish answers": lambda home: _served("PREFECT_API_URL", partial(_http, 200), "/api"),
        "Prefect: 401": lambda home: _served("PREFECT_API_URL", partial(_http, 401), "/api"),
        "Prefect: killed": lambda home: _signalled(signal.SIGKILL),
        "Prefect: stopped": lambda home: _signalled(signal.SIGSTOP),
        "Prefect: corrupt database": lambda home: _corrupt(home / ".servers/prefect/prefect.db"),
        "Prefect: locked database": lambda home: _locked(home / ".servers/prefect/prefect.db"),
        "MLflow: closed port": lambda home: _address("DPAR_TRACKING_URI", _closed_port()),
        "MLflow: black hole": lambda home: _served("DPAR_TRACKING_URI", _black_hole),
        "MLflow: rubbish answers": lambda home: _served("DPAR_TRACKING_URI", partial(_http, 200)),
        "MLflow: corrupt database": lambda home: _corrupt(home / ".servers/mlflow.db"),
        "MLflow: locked database": lambda home: _locked(home / ".servers/mlflow.db"),
        "MLflow: deleted experiment": lambda home: _deleted_experiment(home / ".servers/mlflow.db"),
        "disk: full": lambda home: _full_disk(),
    }
    for name, fault in faults.items():
        yield Row(kind=KIND, name=name, run=partial(_met, place, name, fault))


def _met(place: Workplace, name: str, make: Callable[[Path], AbstractContextManager[Fault]]) -> Outcome:
    """Run the last two stages of a finished run again with the fault, then once more without it."""
    place.prepare()
    with place.home(name, source=place.reference, without=place.last_but_one) as home:
        with make(home) as fault:
            run = place.start("run", home=home, environment=fault.environment, before=fault.before)
            if fault.during is not None:
                fault.during(run)
            code = run.wait(_longest(place))
        return _judged(place, home, fault, run, code)


def _longest(place: Workplace) -> float:
    """Seconds that a run with a fault may take."""
    return sum(place.seconds.values()) + _EXTRA_S


def _judged(place: Workplace, home: Path, fault: Fault, run: Run, code: int | None) -> Outcome:
    """Whether the run ended in time and made everything, or said why not and left it to the next run."""
    said = place.unusual_line(run)
    unmade = place.differing(home) if code is not None else []
    again = place.finish(home)
    outcome = partial(Outcome, open_ports=tuple(run.open_ports | again.open_ports))
    if code is None:
        return outcome(verdict="lost", said=f"no end within {_longest(place):.0f} s: {said}")
    if differing := place.differing(home):
        return outcome(verdict="lost", said=f"not as in an undisturbed run: {differing[0]}")
    if (code or unmade) and not fault.may_fail:
        return outcome(verdict="lost", said=f"exit code {code}, {len(unmade)} files not made: {said}")
    return outcome(verdict="survived" if said else "silent", said=said)


@contextmanager
def _address(variable: str, port: int, path: str = "") -> Iterator[Fault]:
    yield Fault({variable: f"http://127.0.0.1:{port}{path}"})


@contextmanager
def _served(variable: str, serve: Callable[[ExitStack], int], path: str = "") -> Iterator[Fault]:
    with ExitStack() as stack:
        yield Fault({variable: f"http://127.0.0.1:{serve(stack)}{path}"})


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _black_hole(stack: ExitStack) -> int:
    """A port that takes connections and never answers."""
    opened = stack.enter_context(socket.socket())
    opened.bind(("127.0.0.1", 0))
    opened.listen(64)
    port: int = opened.getsockname()[1]
    return port


def _http(status: int, stack: ExitStack) -> int:
    """A server that answers everything with a status and bytes that mean nothing."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"\x00rubbish<html>{")

        do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _answer

        def log_message(self, *_: object) -> None:
            pass

    server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stack.callback(server.shutdown)
    return int(server.server_address[1])


@contextmanager
def _signalled(number: signal.Signals) -> Iterator[Fault]:
    """The temporary server gets a signal once the first stage runs."""
    stopped: list[int] = []

    def during(run: Run) -> None:
        while run.process.poll() is None:
            server = run.find("prefect", "server") or run.find("uvicorn", "prefect")
            if server is not None and run.find("-m stages.", "--job") is not None:
                for process in [server, *server.children(recursive=True)]:
                    stopped.append(process.pid)
                    process.send_signal(number)
                return
            time.sleep(0.1)

    yield Fault({}, during=during)
    for pid in stopped if number == signal.SIGSTOP else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def _corrupt(database: Path) -> Iterator[Fault]:
    database.parent.mkdir(parents=True, exist_ok=True)
    for path in database.parent.glob(f"{database.name}-*"):
        path.unlink()
    database.write_bytes(b"no database" * 1000)
    yield Fault({})


@contextmanager
def _locked(database: Path) -> Iterator[Fault]:
    """Another process writes to the database and does not end."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield Fault({})
        connection.execute("ROLLBACK")


@contextmanager
def _deleted_experiment(database: Path) -> Iterator[Fault]:
    """As `mlflow experiments delete` leaves it."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE experiments SET lifecycle_stage = 'deleted' WHERE experiment_id != 0")
    yield Fault({})


@contextmanager
def _full_disk() -> Iterator[Fault]:
    """No file may grow beyond a few kilobytes, as on a disk that is full."""
    yield Fault({}, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_LIMIT,) * 2), may_fail=True)
