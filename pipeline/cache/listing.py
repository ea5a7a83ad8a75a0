"""Digest of a data set's image files, computed from their metadata.

The digest covers the path below the root, the size, the times and the inode of every file that stage `dataset` looks
at, whatever its name: contents tell what is an image. Replaced files and redirected links change it. A copy of the
images elsewhere has another digest; stage `dataset` then runs again, and if the bytes are equal, all later stages stay
cached.

The digest of each folder is remembered in home/.listings.json. A scan that is not deep trusts it while the folder
itself is unchanged, so files overwritten in place go unnoticed until a deep scan. The same file holds a number for each
root, its generation, which is part of the digest. It is raised when a stage finds bytes that differ from those indexed;
the images are then indexed again even if their metadata are unchanged.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from stages.images.names import passed_over, require_utf8
from stages.runtime.artifact import read_json, write_json

MEMORY = ".listings.json"
_LOCK = ".locks/listings.lock"
Entry = dict[str, Any]
"""Remembered state of a folder: its own `stat`, the `digest` of its files, the names of its `folders` and of `links`
to folders, and the time it was first `seen` in this state."""


class Scan(NamedTuple):
    """Result of scanning a root."""

    digest: str
    trusted_since: float | None
    """Time since which the folders whose files were skipped are unchanged (epoch seconds); None if none was skipped."""


def scan(root: Path, source: str, home: Path, *, deep: bool) -> Scan:
    """Scan the metadata of the images below a root, or of the root itself if it is a tar file.

    Args:
        root: Result of `stages.images.sources.image_root`.
        source: `dataset.source` of the settings.
        home: Folder of the cache, where folder digests are remembered.
        deep: Check every file; otherwise skip the files of unchanged folders.

    Raises:
        OSError: A folder cannot be listed.
        InputError: The name of a folder is not UTF-8.
    """
    place = os.path.abspath(root)
    known = _known(home, place)
    if root.is_file():
        return Scan(_digest(source, known["generation"], {"": _metadata(os.stat(root))}), None)
    found, trusted = _walk(root, source, {} if deep else known["folders"])
    for name, entry in found.items():  # an unchanged entry keeps its date, so that the file is not rewritten
        before = known["folders"].get(name)
        if before is not None and before | {"seen": 0} == entry | {"seen": 0}:
            found[name] = before
    if found != known["folders"]:
        with _memory(home) as memory:
            memory[place] = {"generation": _generation(memory.get(place)), "folders": found}
    digest = _digest(source, known["generation"], {name: entry["digest"] for name, entry in found.items()})
    return Scan(digest, min((found[name]["seen"] for name in trusted), default=None))


def distrust(root: Path, home: Path) -> None:
    """Force the images below a root to be indexed again, even if their metadata are unchanged."""
    place = os.path.abspath(root)
    with _memory(home) as memory:
        memory[place] = {"generation": _generation(memory.get(place)) + 1, "folders": {}}


def _walk(root: Path, source: str, known: dict[str, Entry]) -> tuple[dict[str, Entry], list[str]]:
    """Entries of the folders below a root by relative path, and the names of those that are unchanged."""
    found: dict[str, Entry] = {}
    trusted = []
    waiting = [""]
    while waiting:
        name = waiting.pop()
        folder = root / name
        own = _folder_stat(os.stat(folder))
        entry = known.get(name)
        if entry is not None and entry["stat"] == own:
            trusted.append(name)
        else:
            entry = {"stat": own, "seen": time.time(), **_read_folder(folder, _is_read(source, name))}
        found[name] = entry
        if source == "image_folder":  # a class folder may be a link, a folder inside it may not
            below = entry["folders"] + (entry["links"] if name == "" else [])
            waiting += [os.path.join(name, each) for each in below]
    return found, trusted


def _is_read(source: str, folder: str) -> Callable[[str], bool]:
    """A predicate on file names: which files of a folder `stages.images.sources` reads."""
    if source == "imagenet_tar":
        return lambda name: ".tar" in name.lower() or name.lower().endswith(".tgz")
    return lambda name: source != "image_folder" or folder != ""


def _read_folder(folder: Path, is_read: Callable[[str], bool]) -> Entry:
    """Digest of the metadata of a folder's own files, and the names of its subfolders; what is passed over is left out.

    The folder is opened first, so that the kernel does not resolve the whole path for each file: a quarter faster.
    """
    lines: list[str] = []
    folders: list[str] = []
    links: list[str] = []
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(descriptor) as entries:
            for entry in entries:
                name = entry.name
                if passed_over(name) is not None:
                    continue
                if _is_folder(entry):
                    require_utf8(folder, name)
                    (links if entry.is_symlink() else folders).append(name)
                elif is_read(name):
                    try:
                        lines.append(f"{name}\0{_metadata(entry.stat())}\0")
                    except OSError:
                        lines.append(f"{name}\0leads nowhere\0")
    finally:
        os.close(descriptor)
    lines.sort()
    return {"digest": _sha256("".join(lines)), "folders": sorted(folders), "links": sorted(links)}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circle of links
        return False


def _metadata(stat: os.stat_result) -> str:
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _folder_stat(stat: os.stat_result) -> list[int]:
    return [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _digest(source: str, generation: int, folders: dict[str, str]) -> str:
    lines = [f"{name}\0{digest}\0" for name, digest in sorted(folders.items())]
    return _sha256(f"{source} {generation}\0{''.join(lines)}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _known(home: Path, place: str) -> dict[str, Any]:
    """Remembered state of a root; empty if it is lost or damaged."""
    known = _read(home).get(place)
    folders = known.get("folders") if isinstance(known, dict) else None
    whole = isinstance(folders, dict) and all(map(_is_entry, folders.values()))
    return {"generation": _generation(known), "folders": folders if whole else {}}


def _is_entry(entry: Any) -> bool:
    kinds = {"stat": list, "digest": str, "folders": list, "links": list, "seen": float}
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in kinds.items())


def _generation(known: Any) -> int:
    number = known.get("generation") if isinstance(known, dict) else None
    return number if isinstance(number, int) else 0


def _read(home: Path) -> dict[str, Any]:
    try:
        memory = read_json(home / MEMORY)
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}


@contextmanager
def _memory(home: Path) -> Iterator[dict[str, Any]]:
    """The remembered state, locked for an update: it is written back when the block ends, if home can be written."""
    lock = home / _LOCK
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("ab")
    except OSError:
        yield _read(home)
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        memory = _read(home)
        yield memory
        write_json(home / MEMORY, memory)
