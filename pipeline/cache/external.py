"""Digests of what a run reads from outside the graph: the image folder or tar, and weights files.

An image folder's digest is that of its listing, paths and sizes; it is remembered folder by folder with the folder's
modification time, so that a second look at ImageNet costs a thousand `stat` calls. A file that is written over in place
changes no folder and is not noticed: images are added, removed or replaced.

A tar of class tars is known by the headers of those: names, sizes and times. To digest 138 GB would take minutes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.section import Section
from pipeline.graph import Stage
from stages.images.archives import headers, whole
from stages.images.sources import image_root
from stages.runtime.artifact import file_sha256, read_json, write_json
from stages.runtime.errors import InputError


def external_digest(stage: Stage, section: Section, home: Path) -> str | None:
    """Digest of what `stage` reads from outside, None when it reads nothing.

    Raises:
        InputError: It is not there.
    """
    if stage.external is None:
        return None
    if stage.external == "images":
        root = image_root(section)  # type: ignore[arg-type]
        if root.is_file():
            return _remembered(root, _headers_digest, home / ".digests.json")
        return _listing_digest(root, home / ".listings.json")
    path: Path | None = getattr(section, stage.external, None)  # DPAR, for one, imports nothing
    if getattr(section, "source", None) == "train":  # what is trained reads no weights
        path = None
    if path is None:
        return None
    if not path.exists():
        raise InputError(
            f"{stage.name}.{stage.external} is {path}, and there is no such file: give the path of the weights"
        )
    return _remembered(path, file_sha256, home / ".digests.json")


def _listing_digest(root: Path, memory_path: Path) -> str:
    memory = _read_memory(memory_path)
    found: dict[str, Any] = {}
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        place, mtime = str(folder), folder.stat().st_mtime_ns
        known = memory.get(place)
        if known is None or known["mtime"] != mtime:
            known = {"mtime": mtime, **_read_folder(folder)}
        found[place] = known
        # A class folder may be a link, a folder inside it may not: as stages.images.sources has it.
        waiting += [folder / name for name in known["folders"] + (known["links"] if folder == root else [])]
    if any(memory.get(place) != entry for place, entry in found.items()):
        write_json(memory_path, memory | found)
    lines = [f"{Path(place).relative_to(root)} {entry['digest']}" for place, entry in sorted(found.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _read_folder(folder: Path) -> dict[str, Any]:
    """Digest of the names and sizes of a folder's own files, and its folders by name; hidden ones left out."""
    with os.scandir(folder) as entries:
        shown = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    lines = [f"{entry.name} {entry.stat().st_size}" for entry in shown if entry.is_file()]
    folders = [entry for entry in shown if entry.is_dir()]
    return {
        "digest": hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest(),
        "folders": [entry.name for entry in folders if not entry.is_symlink()],
        "links": [entry.name for entry in folders if entry.is_symlink()],
    }


def _headers_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for header in headers(whole(file, path)):
            digest.update(header)
    return digest.hexdigest()


def _remembered(path: Path, digest: Callable[[Path], str], memory_path: Path) -> str:
    """The digest of a file, taken anew when its size or time changed."""
    stat = path.stat()
    place, facts = str(path.resolve()), {"size": stat.st_size, "mtime": stat.st_mtime_ns}
    memory = _read_memory(memory_path)
    known = memory.get(place)
    if known and {name: known[name] for name in facts} == facts:
        return str(known["digest"])
    fresh = digest(path)
    write_json(memory_path, memory | {place: facts | {"digest": fresh}})
    return fresh


def _read_memory(path: Path) -> dict[str, Any]:
    """A lost or damaged memory costs time, nothing else."""
    try:
        memory = read_json(path)
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}
