"""Training checkpoints, each with a SHA-256 file. A killed run resumes from the newest undamaged checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, cast

import torch

from stages.runtime.artifact import file_sha256, write_atomic
from stages.runtime.errors import ArtifactError

logger = logging.getLogger(__name__)
_NAME = re.compile(r"(step-\d{9})\.(pt|sha256)")


class _HashedFile:
    """A file that computes the SHA-256 of the written bytes, so that they need not be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, sha256()

    def write(self, data: bytes) -> int:
        """Write bytes and update the digest."""
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> None:
    """Write the state after `step` optimiser steps, then remove all but the newest `keep` checkpoints.

    The digest is written after the state. A checkpoint without a digest is incomplete.
    """
    path = folder / f"step-{step:09d}.pt"
    digests: list[str] = []

    def write(file: IO[bytes]) -> None:
        hashed = _HashedFile(file)
        torch.save(state, cast("IO[bytes]", hashed))  # torch.save only calls write and flush
        digests.append(hashed.digest.hexdigest())

    write_atomic(path, write)
    write_atomic(_digest_path(path), lambda file: file.write(_line(path, digests[0])))
    kept = {path.stem for path in _newest_first(folder)[:keep]}
    for found in list(folder.iterdir()):
        if (name := _NAME.fullmatch(found.name)) and name[1] not in kept:
            found.unlink()


def load_latest(folder: Path, map_location: torch.device) -> dict[str, Any] | None:
    """State of the newest undamaged checkpoint, or None if there is none. Each damaged checkpoint gives a warning."""
    for path in _newest_first(folder):
        if damage := _damage(path):
            logger.warning("checkpoint %s %s: resuming from the one before", path, damage)
            continue
        state: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return state
    return None


def require_same(what: str, found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Check what a checkpoint says about the run that wrote it, e.g. its data.

    Raises:
        ArtifactError: A value differs from that of the present run.
    """
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ArtifactError(
                f"the checkpoints in {folder} were trained with {name} {found.get(name)}, expected {wanted.get(name)}: "
                f"they belong to other {what}, remove them to train from the start"
            )


def _damage(path: Path) -> str | None:
    """Description of a checkpoint's damage, as the end of a sentence; None if it is whole."""
    try:
        digest = _digest_path(path).read_bytes()
    except FileNotFoundError:
        return "has no digest beside it, its writer was killed"
    except OSError as error:
        return f"cannot be compared with its digest ({error.strerror})"
    try:
        found = file_sha256(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest == _line(path, found) else f"is damaged: {_digest_path(path).name} is not its digest"


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _line(path: Path, digest: str) -> bytes:
    """A digest in the format of `sha256sum --check`."""
    return f"{digest}  {path.name}\n".encode()


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)), reverse=True)
