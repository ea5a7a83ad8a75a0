"""Files of an artifact. Each is written under a temporary name and renamed, so a file with its final name is whole.

`record/` in an artifact describes how it was made (log, metrics, checkpoints, units). It is not part of the content and
not part of the content digest.

After a power cut: a file is flushed to disk before it is renamed, so a file with its final name is whole. The rename
itself may be lost until the folder is flushed, which happens only when the artifact is committed. A resumed run
therefore checks every file that a manifest lists, and writes missing ones again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from stages.runtime.regular_file import open_if_regular

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)
RECORD = "record"
_PARTIAL = "partial"


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` on a temporary file beside `path`, flush it to disk, and rename it to `path`.

    Several processes, also on several machines, may write the same file: the last rename wins, and the file is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.{_PARTIAL}")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove temporary files of killed processes below a folder. No process may be writing to the folder."""
    for partial in folder.rglob(f"*.{_PARTIAL}"):
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """Parse a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_arrays(path: Path) -> dict[str, NDArray[Any]] | None:
    """Arrays of an `.npz` file by name; None if the file is missing or damaged, with a warning if it is damaged.

    The file holds a CRC-32 of each array. A damaged array name is not detected, so callers check the names.
    """
    import numpy as np  # commands that only list artifacts start faster without it

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            return {name: saved[name] for name in saved.files}
    except FileNotFoundError:
        return None
    except Exception as error:  # on damaged bytes zipfile and NumPy raise almost anything
        logger.warning("%s is damaged (%s): made again", path, " ".join(str(error).split()))
        return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        OSError: The file cannot be read, or is no regular file.
    """
    with open_if_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # it is a BufferedReader


def _plain(value: Any) -> Any:
    """Convert numpy scalars and paths for JSON."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
