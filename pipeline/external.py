"""Digests of what a run reads from outside the graph: the image folder, and weights files.

An image folder's digest is that of its listing, paths and sizes; it is remembered class folder by class folder with the
folder's modification time, so that a second look at ImageNet costs a thousand `stat` calls.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.schema import Section
from pipeline.graph import Stage
from stages.artifact import read_json, write_json
from stages.errors import InputError
from stages.sources import image_root


def external_digest(stage: Stage, section: Section, home: Path) -> str | None:
    """Digest of what `stage` reads from outside, None when it reads nothing.

    Raises:
        InputError: It is not there.
    """
    if stage.external is None:
        return None
    if stage.external == "images":
        return _listing_digest(image_root(section), home / ".listing.json")  # type: ignore[arg-type]
    path: Path | None = getattr(section, stage.external)
    return None if path is None else _file_digest(path, f"{stage.name}.{stage.external}", home / ".digests.json")


def _listing_digest(root: Path, memory_path: Path) -> str:
    memory = _read_memory(memory_path)
    found: dict[str, Any] = {}
    for folder in _folders(root):
        place, mtime = str(folder), folder.stat().st_mtime_ns
        known = memory.get(place)
        if known is None or known["mtime"] != mtime:
            known = {"mtime": mtime, "digest": _folder_digest(folder)}
        found[place] = known
    if any(memory.get(place) != entry for place, entry in found.items()):
        _write_memory(memory_path, memory | found)
    lines = [f"{Path(place).relative_to(root)} {entry['digest']}" for place, entry in sorted(found.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _folders(root: Path) -> Iterator[Path]:
    """The root and every folder below it."""
    for folder, subfolders, _ in os.walk(root):
        subfolders.sort()
        yield Path(folder)


def _folder_digest(folder: Path) -> str:
    """Digest of the names and sizes of a folder's own files."""
    with os.scandir(folder) as entries:
        lines = sorted(f"{entry.name} {entry.stat().st_size}" for entry in entries if entry.is_file())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_digest(path: Path, setting: str, memory_path: Path) -> str:
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{setting} is {path}, and there is no such file: give the path of the weights") from error
    place, facts = str(path.resolve()), {"size": stat.st_size, "mtime": stat.st_mtime_ns}
    memory = _read_memory(memory_path)
    known = memory.get(place)
    if known and {name: known[name] for name in facts} == facts:
        return str(known["digest"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _write_memory(memory_path, memory | {place: facts | {"digest": digest}})
    return digest


def _read_memory(path: Path) -> dict[str, Any]:
    """A lost or damaged memory costs time, nothing else."""
    try:
        memory = read_json(path)
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _write_memory(path: Path, memory: dict[str, Any]) -> None:
    write_json(path, memory)
