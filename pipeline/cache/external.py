"""Digests of the external files that stages read: image files and weights files.

The digest of images covers file metadata (see `pipeline.cache.listing`). The digest of weights covers the bytes. It
is remembered with the file's size, times and inode, and computed again when one of these changes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from conf.schema import Settings
from conf.section import Section
from pipeline.cache.listing import scan
from pipeline.graph import Stage
from stages.images.sources import image_root
from stages.runtime.artifact import file_sha256, read_json, write_json
from stages.runtime.errors import InputError
from stages.weights.kinds import require_weights_file

MEMORY = ".digests.json"


def external_digest(stage: Stage, section: Section, home: Path, *, deep: bool = False) -> str | None:
    """Digest of the external files that `stage` reads; None if it reads none.

    Args:
        stage: A stage of the graph.
        section: The stage's settings.
        home: Folder of the cache, where digests are remembered.
        deep: Check every image file and read the weights; ignore remembered digests.

    Raises:
        InputError: The files do not exist.
    """
    if stage.external is None:
        return None
    if stage.external == "images":
        return scan(image_root(section), section.source, home, deep=deep).digest  # type: ignore[arg-type, attr-defined]
    path = weights_path(stage, section)
    return None if path is None else _weights_digest(path, home, deep=deep)


def trusted_since(settings: Settings, home: Path) -> float | None:
    """Time since which the image folders that `dpar status` skips are unchanged, epoch seconds; None without any."""
    try:
        root = image_root(settings.dataset)
    except InputError:
        return None
    return scan(root, settings.dataset.source, home, deep=False).trusted_since


def weights_path(stage: Stage, section: Section) -> Path | None:
    """The weights file that `stage` imports; None if it imports none.

    Raises:
        InputError: The file does not exist, is no regular file, or is known to hold no weights.
    """
    if stage.external in (None, "images") or getattr(section, "source", None) == "train":
        return None
    path: Path | None = getattr(section, str(stage.external))
    if path is not None:
        require_weights_file(path, f"{stage.name}.{stage.external}")
    return path


def _weights_digest(path: Path, home: Path, *, deep: bool) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        InputError: The file cannot be read.
    """
    memory = _read_memory(home / MEMORY)
    place = os.path.abspath(path)
    try:
        stat = path.stat()
        metadata = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
        known = memory.get(place)
        if not deep and isinstance(known, dict) and known.get("metadata") == metadata:
            return str(known["digest"])
        digest = file_sha256(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    entry = {"metadata": metadata, "digest": digest}
    if entry != known:
        write_json(home / MEMORY, memory | {place: entry})
    return digest


def _read_memory(path: Path) -> dict[str, Any]:
    """Remembered digests by path; empty if the file is lost or damaged."""
    try:
        memory = read_json(path)
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}
