"""Standard streams of the command `dpar`: closed ones, readers that leave, text that a terminal cannot show."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


def use_utf8() -> None:
    """Start this process again in Python's UTF-8 mode if the locale has another encoding: names of files are UTF-8."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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
