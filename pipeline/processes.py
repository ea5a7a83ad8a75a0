"""Server processes: start one in its own process group, wait until it answers, find it again later, terminate it."""

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
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

HOST = "127.0.0.1"  # servers are for local users only
CODE_ROOT = Path(__file__).resolve().parent.parent
_LOOPBACK = (HOST, "localhost")
_GRACE_S = 10.0  # between SIGTERM and SIGKILL
_POLL_S = 0.1
_SAME_S = 1.0  # tolerance of creation times, which shift when the clock is set; a pid is not reused that soon
_TAIL_LINES = 5
_PR_SET_PDEATHSIG = 1


class ServerError(RuntimeError):
    """A server did not start. The message has the end and the path of its log."""


@dataclass(frozen=True)
class Service:
    """A server process, identified by pid and creation time, since pids are reused."""

    name: str
    pid: int
    created: float
    log: str

    @property
    def alive(self) -> bool:
        """Whether this process, not another one with the same pid, still runs."""
        return self._process() is not None

    def end(self) -> None:
        """Terminate the whole process group: SIGTERM, then SIGKILL. Does nothing if the process has ended."""
        process = self._process()
        if process is None:
            return
        self._signal_group(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        while _runs(process) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._signal_group(signal.SIGKILL)  # for workers that outlived their leader
        with contextlib.suppress(ChildProcessError):  # not a child of this process
            os.waitpid(self.pid, 0)

    def _process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < _SAME_S
            return process if same and _runs(process) else None
        except (psutil.NoSuchProcess, ValueError, OverflowError):  # a damaged file may hold any number
            return None

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # the group has ended
            os.killpg(self.pid, number)


def own_python(*arguments: str) -> list[str]:
    """Command line of a Python process of ours, which imports no code from its current folder."""
    return [sys.executable, "-P", *arguments]


def python_path(code_root: Path) -> str:
    """PYTHONPATH with the code first, so that no other package of the same name is imported.

    Empty parts are left out: they mean the current folder.
    """
    return os.pathsep.join([str(code_root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])


def exempt_loopback(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep proxies named in the environment from catching traffic to servers of this machine."""
    for name, other in (("no_proxy", "NO_PROXY"), ("NO_PROXY", "no_proxy")):  # programs read one or the other
        hosts = [host.strip() for host in environment.get(name, environment.get(other, "")).split(",")]
        if "*" not in hosts:
            hosts += [host for host in _LOOPBACK if host not in hosts]
        environment[name] = ",".join(filter(None, hosts))


def start(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    die_with_parent: bool,
    folder: Path | None = None,
    umask: int = -1,
) -> Service:
    """Start a process and append its output to `log`. Ctrl-C in this terminal does not reach it.

    Args:
        name: Name in messages.
        command: Command line.
        environment: The whole environment of the process.
        log: File for its output, which only its owner may read; the folder is created.
        die_with_parent: Let the kernel terminate it when the thread that started it ends for any reason (Linux only).
        folder: Its current folder; None is that of this process.
        umask: Its umask; -1 is that of this process.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab", opener=open_private) as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            umask=umask,
            start_new_session=True,
            preexec_fn=parent_death_hook() if die_with_parent else None,
        )
    service = Service(name, process.pid, psutil.Process(process.pid).create_time(), str(log))
    process.returncode = 0  # `Service` watches the process; without this, Popen warns that it was not waited for
    return service


def open_private(path: str, flags: int) -> int:
    """An opener for `open`: only the owner may read the file."""
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)  # it may be older, and open to others
    return descriptor


def marked(variable: str, value: str, commands: Sequence[str]) -> Iterator[Service]:
    """Processes of this user that were started with a variable, youngest first.

    Args:
        variable: Name of the variable.
        value: Its value.
        commands: A process counts if one of these is an argument of its command line; children inherit the variable.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # it has ended, or belongs to another user
            if process.environ().get(variable) == value and not set(commands).isdisjoint(process.cmdline()):
                found.append(Service(process.name(), process.pid, process.create_time(), ""))
    yield from sorted(found, key=lambda service: service.created, reverse=True)


def wait_until(service: Service, is_ready: Callable[[], bool], timeout_s: float) -> None:
    """Wait until a service answers.

    Raises:
        ServerError: The process ended, or did not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    while not is_ready():
        if not service.alive:
            raise ServerError(f"{service.name} ended during startup: {_log_end(service)}")
        if time.monotonic() > deadline:
            raise ServerError(f"{service.name} did not answer within {timeout_s:.0f} s: {_log_end(service)}")
        time.sleep(_POLL_S)


def answers(port: int, path: str) -> bool:
    """Whether a GET request to this machine is answered with 200. Proxies in the environment are not used."""
    return fetch(port, path) is not None


def fetch(port: int, path: str, authorization: str | None = None) -> bytes | None:
    """Body of a GET request to this machine; None unless it was answered with 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path, headers={"Authorization": authorization} if authorization else {})
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return body if response.status == http.client.OK else None


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def listener(port: int) -> str | None:
    """Name and pid of the process that listens on a port of this machine; None if the port is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port in TIME_WAIT counts as free
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
    """Whether a process runs. A zombie has ended; its parent has not waited for it yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _log_end(service: Service) -> str:
    lines = Path(service.log).read_text(encoding="utf-8", errors="replace").split("\n")
    last = " | ".join([line.strip() for line in lines if line.strip()][-_TAIL_LINES:])
    return f"{last or 'no output'} (log: {service.log})"


def parent_death_hook() -> Callable[[], None] | None:
    """A `preexec_fn` that makes the kernel terminate the child when its parent dies; None except on Linux."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def hook() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return hook
