"""Regular files are opened, and nothing else: a FIFO blocks whoever opens it for good, and a device has no end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO

from stages.runtime.errors import InputError

# Without blocking: between the look and the opening, a FIFO may take the file's place.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class IrregularFileError(OSError):
    """What has the name is no regular file. `strerror` says what it is."""


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file, or a link to one, to read its bytes.

    Raises:
        InputError: The file cannot be opened, or is a folder, a FIFO, a socket or a device.
    """
    try:
        return open_if_regular(path)
    except IrregularFileError as error:
        raise InputError(f"{path} is {error.strerror}, expected a regular file: give the path of one") from error
    except OSError as error:
        raise InputError(f"{path} cannot be opened ({error.strerror}), expected a file that can be read") from error
    except ValueError as error:  # a null byte in the name
        raise InputError(f"{str(path)!r} is no path ({error}), expected the path of a file") from error


def open_if_regular(path: Path | str) -> IO[bytes]:
    """The same for code that goes on without the file.

    Raises:
        IrregularFileError: A folder, a FIFO, a socket or a device.
        OSError: The file cannot be opened.
    """
    require_regular(os.stat(path))  # opening alone may act: it rewinds a tape, and wakes who writes to a FIFO
    descriptor = os.open(path, _FLAGS)
    try:
        require_regular(os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(status: os.stat_result) -> None:
    """Raise IrregularFileError unless `status` is that of a regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise IrregularFileError(errno.EINVAL, kind_of(status))


def kind_of(status: os.stat_result) -> str:
    """What a path leads to, in words, e.g. `a FIFO`."""
    return _KINDS.get(stat.S_IFMT(status.st_mode), "a regular file")
