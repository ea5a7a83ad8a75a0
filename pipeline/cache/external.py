"""Digests of the external files that stages read: image files and weights files.

The digest of images covers file metadata (see `pipeline.cache.listing`). The digest of weights covers the bytes. It
is remembered with the file's size, times and inode, and computed again when one of these changes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from conf.dataset import DatasetConfig
from conf.schema import Settings
from conf.section import Section
from pipeline.cache.listing import Scan, scan
from pipeline.cache.memory import remember
from pipeline.graph import Stage
from stages.images.sources import image_root
from stages.runtime.artifact import file_sha256, read_json
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
        InputError: The files do not exist, or cannot be listed or read.
    """
    if stage.external is None:
        return None
    if stage.external == "images":
        return _scan_images(section, home, deep=deep).digest  # type: ignore[arg-type]
    path = weights_path(stage, section)
    return None if path is None else _weights_digest(path, home, deep=deep)


def trusted_since(settings: Settings, home: Path) -> float | None:
    """Time since which the image folders that `dpar status` skips are unchanged, epoch seconds; None without any."""
    try:
        return _scan_images(settings.dataset, home, deep=False).trusted_since
    except InputError:
        return None


def _scan_images(config: DatasetConfig, home: Path, *, deep: bool) -> Scan:
    root = image_root(config)
    try:
        return scan(root, config.source, home, deep=deep)
    except OSError as error:
        raise InputError(
            f"{error.filename or root} cannot be listed ({error.strerror}), expected images of dataset.root: "
            "make it readable, or remove it"
        ) from error


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
        remember(home / MEMORY, memory | {place: entry})
    return digest


def _read_memory(path: Path) -> dict[str, Any]:
    """Remembered digests by path; empty if the file is lost or damaged."""
    try:
        memory = read_json(path)
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}
