"""Long-lived processes: in a group of their own, waited for until they answer, known again later, ended whole."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

HOST = "127.0.0.1"  # servers are for the person at this machine
_GRACE_S = 10.0  # between asking a process to end and killing it
_POLL_S = 0.1
_SAME_S = 1.0  # creation times shift a little when the clock is set; a pid is not used again that soon
_TAIL_LINES = 5
_PR_SET_PDEATHSIG = 1


class ServerError(RuntimeError):
    """A server did not start; the message says where its log is and how it ends."""


@dataclass(frozen=True)
class Service:
    """A process that serves, known by pid and by when it was created: a pid alone may be another's by now."""

    name: str
    pid: int
    created: float
    log: str

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return self._process() is not None

    def end(self) -> None:
        """Ask the whole process group to end, then insist; does nothing to a process that only has the same pid."""
        process = self._process()
        if process is None:
            return
        self._signal_group(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        while _runs(process) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._signal_group(signal.SIGKILL)  # also for workers that outlived their leader
        with contextlib.suppress(ChildProcessError):  # it is another process's child
            os.waitpid(self.pid, 0)

    def _process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < _SAME_S
            return process if same and _runs(process) else None
        except psutil.NoSuchProcess:
            return None

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # all of it has ended
            os.killpg(self.pid, number)


def start(
    name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, *, die_with_parent: bool
) -> Service:
    """Start a process with its output appended to `log`; Ctrl-C in this terminal does not reach it.

    Args:
        name: For messages.
        command: What to run.
        environment: All of the process's environment.
        log: Where its output goes; the folder is made.
        die_with_parent: Have the kernel end it when the thread that starts it ends, however that comes about.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=parent_death_hook() if die_with_parent else None,
        )
    service = Service(name, process.pid, psutil.Process(process.pid).create_time(), str(log))
    process.returncode = 0  # `Service` watches it from here on; without this Popen warns of a child not waited for
    return service


def wait_until(service: Service, is_ready: Callable[[], bool], timeout_s: float) -> None:
    """Wait until a service answers.

    Raises:
        ServerError: It ended, or it took too long.
    """
    deadline = time.monotonic() + timeout_s
    while not is_ready():
        if not service.alive:
            raise ServerError(f"{service.name} ended while it started: {_log_end(service)}")
        if time.monotonic() > deadline:
            raise ServerError(f"{service.name} did not answer within {timeout_s:.0f} s: {_log_end(service)}")
        time.sleep(_POLL_S)


def answers(port: int, path: str) -> bool:
    """Whether a GET on this machine is answered with 200. Proxies that the environment names are not asked."""
    return fetch(port, path) is not None


def fetch(port: int, path: str) -> bytes | None:
    """Body of a GET on this machine, None unless it was answered with 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return body if response.status == http.client.OK else None


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def listener(port: int) -> str | None:
    """Who listens on a port of this machine, for a person; None when it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port just left is free
        try:
            probe.bind((HOST, port))
        except OSError:
            return _owner(port)
    return None


def _owner(port: int) -> str:
    with contextlib.suppress(psutil.Error):  # another user's connections may be hidden
        for connection in psutil.net_connections("tcp"):
            bound = connection.laddr[1] if connection.laddr else None
            if connection.status == psutil.CONN_LISTEN and bound == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another process"


def _runs(process: psutil.Process) -> bool:
    """A zombie runs no more; its parent has only not looked yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _log_end(service: Service) -> str:
    lines = Path(service.log).read_text(encoding="utf-8", errors="replace").split("\n")
    last = " | ".join([line.strip() for line in lines if line.strip()][-_TAIL_LINES:])
    return f"{last or 'it left no output'} (log: {service.log})"


def parent_death_hook() -> Callable[[], None] | None:
    """What a child must call before it becomes its program, so that the kernel ends it with its parent; Linux only."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def hook() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return hook
