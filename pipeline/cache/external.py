"""Digests of what a run reads from outside the graph: the image files, and weights files.

Images are known by their metadata, see `pipeline.cache.listing`. Weights are known by their bytes; the digest is
remembered together with the file's size, times and inode, and taken again when one of them has changed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from conf.schema import Settings
from conf.section import Section
from pipeline.cache.listing import look
from pipeline.graph import Stage
from stages.images.sources import image_root
from stages.runtime.artifact import file_sha256, read_json, write_json
from stages.runtime.errors import InputError

MEMORY = ".digests.json"


def external_digest(stage: Stage, section: Section, home: Path, *, deep: bool = False) -> str | None:
    """Digest of what `stage` reads from outside, None when it reads nothing.

    Args:
        stage: Of the graph.
        section: Its settings.
        home: Where digests are remembered.
        deep: Look at every image file, and read the weights, whatever is remembered.

    Raises:
        InputError: It is not there.
    """
    if stage.external is None:
        return None
    if stage.external == "images":
        return look(image_root(section), section.source, home, deep=deep).digest  # type: ignore[arg-type, attr-defined]
    path = weights_path(stage, section)
    return None if path is None else _weights_digest(path, home, deep=deep)


def trusted_since(settings: Settings, home: Path) -> float | None:
    """Since when image folders are unchanged whose files `dpar status` need not look at; None if it looks at all."""
    try:
        root = image_root(settings.dataset)
    except InputError:
        return None
    return look(root, settings.dataset.source, home, deep=False).trusted_since


def weights_path(stage: Stage, section: Section) -> Path | None:
    """The weights file that `stage` reads from outside, None when it reads none.

    Raises:
        InputError: It is not there.
    """
    if stage.external in (None, "images") or getattr(section, "source", None) == "train":
        return None
    path: Path | None = getattr(section, str(stage.external))
    if path is not None and not path.is_file():
        raise InputError(
            f"{stage.name}.{stage.external} is {path}, and there is no such file: give the path of the weights"
        )
    return path


def _weights_digest(path: Path, home: Path, *, deep: bool) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        InputError: It cannot be read.
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
    """A lost or damaged memory costs time, nothing else."""
    try:
        memory = read_json(path)
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}
