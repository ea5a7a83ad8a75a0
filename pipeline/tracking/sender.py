"""The thread that sends a journal to a server, and says when the server does not answer.

Only this thread waits for the server. A run never does, but for a few seconds at its end.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence

from pipeline.servers import ServerError
from pipeline.tracking.journal import Journal, JournalError, set_aside, unfinished
from pipeline.tracking.view import Server, StoreError, View, first_line

logger = logging.getLogger(__name__)
PERIOD_S = 2.0
PAUSE_S = 30.0  # between tries, at most, while the server does not answer
PATIENCE_S = 10.0  # without an answer, until the run says so
START_S = 14.0  # for a server that is starting
PREPARE_S = 45.0  # for our own work: importing a client library, creating a database
_LAST_TRY_S = 4.0  # at the end, for a server that has not answered for long
_FIRST_PAUSE_S = 1.0


class Sender(threading.Thread):
    """Sends a journal while it grows. No error of the server ends it, and it says each outage once.

    Args:
        server: The server.
        journal: The journal of this run, locked by this process.
    """

    def __init__(self, server: Server, journal: Journal) -> None:
        super().__init__(name=f"{server.name}-sender", daemon=True)
        self.server = server
        self._journal = journal
        self._ending, self._given_up = threading.Event(), threading.Event()
        self._view: View | None = None
        self._prepared = self._connected = False
        self._asking_since: float | None = None  # of what has not been answered
        self._reason = "still starting"
        self._said = False
        self._hopeless = False  # waiting does not mend it
        self.sent_all = False
        """Whether the server has received all events."""
        self.damaged = False
        """Whether the journal had to be set aside."""

    def run(self) -> None:
        """Send every `PERIOD_S` seconds, after a failure with growing pauses, and at the end until all is sent."""
        pause = 0.0
        while not self._ending.wait(pause) and not self.damaged:
            pause = PERIOD_S if self._try_to_send() else min(PAUSE_S, max(2 * pause, _FIRST_PAUSE_S))
        while not self.damaged:
            self.sent_all = self._try_to_send()
            if self.sent_all or self._hopeless or self._given_up.wait(_FIRST_PAUSE_S):
                break
        if self.sent_all:
            self._journal.remove()
        else:
            self._ending.wait()  # the run writes to it until then, even to a damaged one
            self._journal.close()

    def end(self) -> None:
        """Begin to send the remaining events. A server that has not answered for long gets one more try."""
        if self._asking_since is not None:
            self._asking_since = max(self._asking_since, time.monotonic() - PATIENCE_S + _LAST_TRY_S)
        self._ending.set()

    def wait(self, waited_s: float) -> bool:
        """Wait for the remaining events; returns whether all were sent. It ends if the server does not answer.

        Args:
            waited_s: Seconds that the run has waited at its end for other servers.
        """
        deadline = time.monotonic() + self.server.close_s - waited_s
        while self.is_alive() and time.monotonic() < deadline and self._silence() < self._patience():
            self.join(0.05)
        self._given_up.set()
        return self.sent_all

    def say_if_silent(self) -> None:
        """Warn, once, if the server does not answer."""
        if self._silence() >= self._patience():
            self._say()

    @property
    def reason(self) -> str:
        """Why the server does not receive events."""
        return self._reason

    def _silence(self) -> float:
        since = self._asking_since
        return 0.0 if since is None else time.monotonic() - since

    def _patience(self) -> float:
        if not self._prepared:
            return PREPARE_S
        return PATIENCE_S if self._connected or not self.server.starts else START_S

    def _say(self) -> None:
        if not self._said and not self._ending.is_set():  # at the end another line says what was not received
            self._said = True
            server = self.server
            logger.warning(
                "%s (%s) does not answer: %s: going on without it, what it misses is sent by %s",
                *(server.name, server.address, self._reason, server.later),
            )

    def _heard(self) -> None:
        """The server has answered."""
        self._asking_since, self._connected, self._reason = time.monotonic(), True, "no answer"
        if self._said:
            self._said = False
            logger.warning("%s (%s) answers again", self.server.name, self.server.address)

    def _try_to_send(self) -> bool:
        self._asking_since = self._asking_since or time.monotonic()
        try:
            if not self._prepared:
                self.server.prepare()
                self._asking_since, self._prepared = time.monotonic(), True
            is_new = self._view is None
            view = self._view = self._view or self.server.connect()
            if is_new:
                view.ping()
                self._heard()
                send_left_behind(self.server, view, self._heard)
            elif not self._journal.unsent():
                view.ping()
            view.send(self._journal, self._heard)
            self._heard()
            self._asking_since = None
        except JournalError as error:
            self.damaged = True
            set_aside(self._journal.folder, error)
        except Exception as error:
            self._view, self._reason = None, first_line(error)
            self._hopeless = isinstance(error, (StoreError, ServerError))
            logger.info("%s (%s) does not answer: %s", self.server.name, self.server.address, self._reason)
            if self._hopeless:
                self._say()
            return False
        return not self.damaged


class Watch(threading.Thread):
    """Lets senders that wait for their servers say so."""

    def __init__(self, senders: Sequence[Sender]) -> None:
        super().__init__(name="server-watch", daemon=True)
        self._senders = senders
        self._done = threading.Event()

    def run(self) -> None:
        """Look twice a second."""
        while not self._done.wait(0.5):
            for sender in self._senders:
                sender.say_if_silent()

    def end(self) -> None:
        """Stop looking."""
        self._done.set()


def send_left_behind(server: Server, view: View, on_sent: Callable[[], None] = lambda: None) -> int:
    """Send the journals of dead processes: their runs and stages are marked as killed. Returns how many were sent.

    They come first: a stage that resumes now must not be marked as killed later.
    """
    sent = 0
    for journal in unfinished(server.journals):
        with contextlib.closing(journal):
            try:
                send_rest(view, journal, on_sent)
                sent += 1
            except JournalError as error:
                set_aside(journal.folder, error)
            except Exception as error:  # a journal that the server always rejects must not block this run
                logger.warning("%s does not accept %s: %s", server.name, journal.folder, first_line(error))
    return sent


def send_rest(view: View, journal: Journal, on_sent: Callable[[], None] = lambda: None) -> None:
    """Send the whole journal of a dead process and remove it.

    Raises:
        JournalError: The journal is damaged.
        Exception: Any error of the server or the network.
    """
    journal.complete()
    view.send(journal, on_sent)
    journal.remove()
