"""Watches which sockets the processes that a test starts listen on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

_PERIOD_S = 0.2  # what listens does so for the life of its process


@dataclass
class Listening:
    """Sockets that listened, each as the command line of its process and the address it is bound to."""

    found: set[tuple[str, str]] = field(default_factory=set)
    processes: set[str] = field(default_factory=set)

    def of(self, word: str) -> set[str]:
        """Addresses of the processes with a word in their command line."""
        return {address for command, address in self.found if word in command}

    def look(self) -> None:
        """Look at all descendants of this process once."""
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended
                command = " ".join(process.cmdline())
                self.processes.add(command)
                for connection in process.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        self.found.add((command, connection.laddr.ip))


@contextlib.contextmanager
def watched() -> Iterator[Listening]:
    """Watch all descendants of this process during the block."""
    listening, ending = Listening(), threading.Event()

    def watch() -> None:
        while not ending.wait(_PERIOD_S):
            listening.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield listening
    finally:
        ending.set()
        thread.join()
