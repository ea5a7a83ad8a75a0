"""What the image files of a data set look like from outside: a digest over their metadata.

It covers the path below the root, the size, the times and the inode of every file that the dataset stage would index,
so that other pictures under the same names are noticed, and a link that leads elsewhere. Copies elsewhere have another
digest: the dataset stage then reads them, and equal bytes leave everything after it cached.

Each folder's digest is remembered in home/.listings.json. A look that is not deep trusts it while the folder itself is
unchanged: files that are written over in place go unnoticed until a deep look. The file also holds a number for each
root, its generation, which enters the digest. It goes up when a stage has met other bytes than were indexed, so that
the images are indexed again even if their metadata tell nothing.
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

from stages.images.sources import is_image
from stages.runtime.artifact import read_json, write_json

MEMORY = ".listings.json"
_LOCK = ".locks/listings.lock"
Entry = dict[str, Any]
"""What is remembered of a folder: its own `stat`, the `digest` of its files, the names of its `folders` and of `links`
to folders, and when it was `seen` so first."""


class Look(NamedTuple):
    """What a look at a root found."""

    digest: str
    trusted_since: float | None
    """Since when folders whose files were not looked at are unchanged (epoch seconds); None if all were looked at."""


def look(root: Path, source: str, home: Path, *, deep: bool) -> Look:
    """Look at the images below a root, or at the tar that it is.

    Args:
        root: From `stages.images.sources.image_root`.
        source: Of the dataset settings.
        home: Where folders are remembered.
        deep: Look at every file; else trust what is remembered of a folder that is unchanged.

    Raises:
        OSError: A folder cannot be listed.
    """
    place = os.path.abspath(root)
    known = _known(home, place)
    if root.is_file():
        return Look(_digest(source, known["generation"], {"": _metadata(os.stat(root))}), None)
    found, trusted = _walk(root, source, {} if deep else known["folders"])
    for name, entry in found.items():  # what looks as it did keeps its first date, and the memory is not written
        before = known["folders"].get(name)
        if before is not None and before | {"seen": 0} == entry | {"seen": 0}:
            found[name] = before
    if found != known["folders"]:
        with _memory(home) as memory:
            memory[place] = {"generation": _generation(memory.get(place)), "folders": found}
    digest = _digest(source, known["generation"], {name: entry["digest"] for name, entry in found.items()})
    return Look(digest, min((found[name]["seen"] for name in trusted), default=None))


def distrust(root: Path, home: Path) -> None:
    """Let the images below a root be indexed again whatever their metadata say."""
    place = os.path.abspath(root)
    with _memory(home) as memory:
        memory[place] = {"generation": _generation(memory.get(place)) + 1, "folders": {}}


def _walk(root: Path, source: str, known: dict[str, Entry]) -> tuple[dict[str, Entry], list[str]]:
    """The folders below a root by relative path, and which of them are as they were known."""
    found: dict[str, Entry] = {}
    trusted = []
    waiting = [""]
    while waiting:
        name = waiting.pop()
        folder = root / name
        own = _own(os.stat(folder))
        entry = known.get(name)
        if entry is not None and entry["stat"] == own:
            trusted.append(name)
        else:
            entry = {"stat": own, "seen": time.time(), **_read_folder(folder, _taken(source, name))}
        found[name] = entry
        if source == "image_folder":  # a class folder may be a link, a folder inside it may not
            below = entry["folders"] + (entry["links"] if name == "" else [])
            waiting += [os.path.join(name, each) for each in below]
    return found, trusted


def _taken(source: str, folder: str) -> Callable[[str], bool]:
    """Which files of a folder `stages.images.sources` takes."""
    if source == "imagenet_tar":
        return lambda name: name.endswith(".tar")
    if source == "image_folder" and folder == "":
        return lambda name: False
    return is_image


def _read_folder(folder: Path, taken: Callable[[str], bool]) -> Entry:
    """Digest of the metadata of a folder's own files, and its folders by name; hidden ones left out.

    The folder is opened, so that the kernel finds each file in it without following the whole path: a quarter faster.
    """
    lines: list[str] = []
    folders: list[str] = []
    links: list[str] = []
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(descriptor) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(name)
                elif taken(name):
                    try:
                        lines.append(f"{name}\0{_metadata(entry.stat())}\0")
                    except OSError:
                        lines.append(f"{name}\0leads nowhere\0")
    finally:
        os.close(descriptor)
    lines.sort()
    return {"digest": _sha256("".join(lines)), "folders": sorted(folders), "links": sorted(links)}


def _metadata(stat: os.stat_result) -> str:
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _own(stat: os.stat_result) -> list[int]:
    return [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _digest(source: str, generation: int, folders: dict[str, str]) -> str:
    lines = [f"{name}\0{digest}\0" for name, digest in sorted(folders.items())]
    return _sha256(f"{source} {generation}\0{''.join(lines)}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _known(home: Path, place: str) -> dict[str, Any]:
    """What is remembered of a root; a lost or damaged memory costs time, nothing else."""
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
    """The memory, to be changed: two processes must not undo each other's changes."""
    lock = home / _LOCK
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        memory = _read(home)
        yield memory
        write_json(home / MEMORY, memory)
