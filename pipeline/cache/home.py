"""The folder of the artifacts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from stages.runtime.errors import InputError


def require_writable(home: Path) -> None:
    """Make the folder, if it is not there, and check that files can be written in it.

    Raises:
        InputError: They cannot.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise InputError(
            f"runtime.home is {home}, which cannot be written ({error.strerror}): set DPAR_HOME to a folder of yours"
        ) from error
