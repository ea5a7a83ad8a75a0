"""What sends journals to a server: a view of runs, which can be down or lost without harm to a run."""

from __future__ import annotations

import contextlib
import sqlite3
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.tracking.journal import Journal

_BUSY_S = 2.0
_LONGEST = 400  # characters of a reason


class StoreError(RuntimeError):
    """A server cannot be used until somebody mends it: damaged, locked or read-only database, or it does not start."""


class View(Protocol):
    """An open connection to a server."""

    def send(self, journal: Journal, on_sent: Callable[[], None]) -> None:
        """Send the unsent events of a journal, and news of its running stages. Failed events are sent next time.

        Args:
            journal: The journal, locked by this process.
            on_sent: Called when the server has accepted something.

        Raises:
            JournalError: The journal is damaged.
            Exception: Any error of the server, its client library or the network.
        """

    def ping(self) -> None:
        """Ask the server for anything.

        Raises:
            Exception: It does not answer.
        """


@dataclass(frozen=True)
class Server:
    """A server that shows runs, and how to reach it.

    Attributes:
        name: Name in messages.
        address: Address in messages.
        journals: Folder of its journals.
        later: How what it misses reaches it, for messages.
        prepare: Our own work before it is asked: importing its client library, creating its database.
        connect: Open a view; called again after each failure.
        starts: Whether it may still be starting.
        close_s: Seconds that a run waits at its end for the remaining events.
    """

    name: str
    address: str
    journals: Path
    later: str
    prepare: Callable[[], None]
    connect: Callable[[], View]
    starts: bool = False
    close_s: float = 15.0


def require_usable(database: Path) -> None:
    """Check that a SQLite file can be written, in moments and without a change. A missing file is fine.

    Client libraries and servers take minutes to report what is wrong with their database.

    Raises:
        StoreError: It is damaged, locked, read-only, or no file.
    """
    if not database.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True, timeout=_BUSY_S)) as opened:
            opened.execute("BEGIN IMMEDIATE")
            opened.execute("SELECT count(*) FROM sqlite_master")
            opened.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        raise StoreError(f"{database}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise StoreError(f"{database} is damaged ({error}); it is left as it is: move it away to begin anew") from error


def first_line(error: BaseException) -> str:
    """First line of an error's message, cut to a readable length; else the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[0], _LONGEST, placeholder=" ...") if lines else type(error).__name__
