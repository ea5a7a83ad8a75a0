"""Standard streams of the command `dpar`: closed ones, readers that leave, text that a terminal cannot show."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import TextIO

READER_LEFT = 128 + signal.SIGPIPE  # exit code when nobody reads the output any more, as of other programs


def open_streams() -> None:
    """Open closed standard streams on nothing: else the first file that is opened takes the place of one.

    Text that the terminal's encoding lacks is escaped instead of raising.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdin = sys.stdin or os.fdopen(0, "r", closefd=False)
    sys.stdout, sys.stderr = _writable(sys.stdout, 1), _writable(sys.stderr, 2)


def drop_output() -> None:
    """Send what is still to be written nowhere, so that the end of this process raises no error for it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _writable(stream: TextIO | None, descriptor: int) -> TextIO:
    stream = stream or os.fdopen(descriptor, "w", closefd=False)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream
