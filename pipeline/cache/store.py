"""The artifact cache: finished artifacts by key, committed by a rename.

home/<stage>/<key>/        finished artifact; manifest.json is written last, before the rename
home/.work/<key>/          unfinished artifact; it survives a kill, and the same key resumes in it
home/.locks/<key>.lock     exclusive lock of the process that makes it, and who that is; the kernel frees it when the
                           last holder dies
home/.locks/<key>.readers  shared lock of the runs that read it, so that `dpar gc` does not remove it
home/.trash/               artifacts replaced by a forced run, until `dpar gc`
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.cache import repository
from pipeline.cache.holder import read_holder, write_holder
from pipeline.cache.manifest import (
    MANIFEST,
    Manifest,
    ManifestError,
    Parts,
    content_digest,
    key_of,
    parse_manifest,
    read_manifest,
    stage_of,
)
from stages.runtime.artifact import RECORD, file_sha256, read_json, remove_partials, write_json
from stages.runtime.errors import ArtifactError

logger = logging.getLogger(__name__)
DAMAGE = "damage.json"  # beside the manifest: damage found when the artifact was read
PARTS = f"{RECORD}/parts.json"  # in a work folder: the parts of its key
WORK, LOCKS, TRASH = ".work", ".locks", ".trash"


class Cache:
    """Artifacts below one root folder."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()

    def path(self, key: str) -> Path:
        """Folder of the finished artifact of a key, whether it exists or not."""
        return self.home / key.partition("-")[0] / key

    def work(self, key: str) -> Path:
        """Folder in which the artifact of a key is made."""
        return self.home / WORK / key

    def lookup(self, key: str) -> Manifest | None:
        """Manifest of a finished artifact; None unless all files have their sizes and no damage is marked."""
        manifest = self.read(self.path(key))
        return None if manifest is None or self.damage(self.path(key), manifest) else manifest

    def read(self, path: Path) -> Manifest | None:
        """Manifest of the artifact in a folder; None if it is missing or invalid."""
        try:
            return read_manifest(path)
        except ManifestError:
            return None

    def damage(self, path: Path, manifest: Manifest) -> str | None:
        """Marked damage of an artifact, else its first file of a wrong size; None if there is no damage."""
        return self.marked(path) or next((what for _, what in self.damages(path, manifest, deep=False)), None)

    def damages(
        self, path: Path, manifest: Manifest, *, deep: bool, skip: Callable[[str], bool] = lambda name: False
    ) -> Iterator[tuple[str, str]]:
        """Every damaged file of an artifact, and its damage.

        Args:
            path: Folder of the artifact.
            manifest: Manifest of the artifact.
            deep: Check contents too, not only sizes.
            skip: Predicate on file names; contents of these files are not checked.
        """
        for name, (size, digest) in manifest.files.items():
            try:
                found = (path / name).lstat()
            except OSError:
                yield name, f"file {name} is missing"
                continue
            if not stat.S_ISREG(found.st_mode):
                yield name, f"{name} is not a regular file"
            elif found.st_size != size:
                yield name, f"file {name} has {found.st_size} bytes, expected {size}"
            elif deep and not skip(name) and (what := _content_damage(path, name, digest)):
                yield name, what

    def mark(self, path: Path, what: str) -> None:
        """Mark an artifact as damaged; the mark stays until it is made again."""
        write_json(path / DAMAGE, {"what": what, "found": time.time()})

    def marked(self, path: Path) -> str | None:
        """Damage that an artifact is marked with; None if it is not marked."""
        try:
            return str(read_json(path / DAMAGE)["what"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError):
            return "it was marked as damaged"

    def artifacts(self, stage: str) -> list[Path]:
        """Folders of a stage whose names are keys, sorted by name. Other entries are not artifacts."""
        try:
            with os.scandir(self.home / stage) as entries:
                return sorted(Path(each.path) for each in entries if stage_of(each.name) == stage and each.is_dir())
        except OSError:
            return []

    def manifests(self, stage: str) -> list[tuple[Path, Manifest]]:
        """Artifacts of a stage with a valid manifest, newest first."""
        found = [(path, manifest) for path in self.artifacts(stage) if (manifest := self.read(path))]
        return sorted(found, key=lambda pair: pair[1].created, reverse=True)

    @contextmanager
    def lock(self, key: str, on_wait: Callable[[str], None] = lambda message: None) -> Iterator[int]:
        """Hold the lock of a key. Yields its file descriptor, which child processes inherit.

        A child that outlives its killed parent keeps the lock, so no other process writes into its folder.

        Args:
            key: The key.
            on_wait: Called before waiting for another process, with a line that names it; the line is logged, too.
        """
        descriptor = self._open_lock(f"{key}.lock")
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"stage {key.partition('-')[0]}: {read_holder(descriptor)} is making {key}, waiting for it"
                logger.warning("%s", message)
                on_wait(message)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            write_holder(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def reading(self, keys: Collection[str]) -> Iterator[tuple[int, ...]]:
        """Keep artifacts from being removed. Yields file descriptors of the locks, which child processes inherit."""
        with ExitStack() as stack:
            descriptors = []
            for key in sorted(keys):
                descriptors.append(self._open_lock(f"{key}.readers"))
                stack.callback(os.close, descriptors[-1])
                fcntl.flock(descriptors[-1], fcntl.LOCK_SH)
            yield tuple(descriptors)

    @contextmanager
    def exclusive(self, key: str) -> Iterator[bool]:
        """Try to lock an artifact against makers and readers. Yields whether it is locked; never waits."""
        with ExitStack() as stack:
            try:
                for name in (f"{key}.lock", f"{key}.readers"):
                    descriptor = self._open_lock(name)
                    stack.callback(os.close, descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _open_lock(self, name: str) -> int:
        path = self.home / LOCKS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def is_locked(self, key: str) -> bool:
        """Whether a process is making the artifact of a key."""
        return self._is_held(f"{key}.lock")

    def is_busy(self, key: str) -> bool:
        """Whether a process is making or reading the artifact of a key."""
        return self._is_held(f"{key}.lock") or self._is_held(f"{key}.readers")

    def _is_held(self, name: str) -> bool:
        path = self.home / LOCKS / name
        if not path.exists():
            return False
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def begin(self, parts: Parts) -> Path:
        """Create the work folder of a key and write the parts of the key into it. The caller holds its lock."""
        work = self.work(key_of(parts))
        work.mkdir(parents=True, exist_ok=True)
        write_json(work / PARTS, parts)
        return work

    def commit(self, parts: Parts, duration_s: float, definitions: Mapping[str, str] | None = None) -> Manifest:
        """Turn the work folder of a key into its artifact; an artifact already there is moved to the trash.

        Raises:
            ArtifactError: The name of a file is not valid in a manifest.
        """
        key = key_of(parts)
        work = self.work(key)
        remove_partials(work)
        (work / PARTS).unlink(missing_ok=True)
        files = {file.relative_to(work).as_posix(): [file.stat().st_size, file_sha256(file)] for file in _files(work)}
        manifest = Manifest(
            key=key,
            stage=parts["stage"],
            parts=parts,
            definitions=dict(definitions or {}),
            digest=content_digest(files),
            files=files,
            created=_now(),
            duration_s=round(duration_s, 3),
            environment=_environment(),
        )
        return self._install(work, manifest)

    def _install(self, work: Path, manifest: Manifest) -> Manifest:
        """Write the manifest and move the folder into place."""
        try:
            parse_manifest(manifest.sealed(), manifest.key)
        except ManifestError as error:
            raise ArtifactError(f"{work} cannot become an artifact: {error}") from error
        path = self.path(manifest.key)
        write_json(work / MANIFEST, manifest.sealed())
        path.parent.mkdir(parents=True, exist_ok=True)
        self.discard(path)
        os.rename(work, path)
        _flush_folder(path.parent)
        return manifest

    def discard(self, path: Path) -> Path:
        """Move a folder to the trash, if it exists. Returns its path in the trash."""
        trash = self.home / TRASH / f"{path.name}.{time.time_ns()}"
        if os.path.lexists(path):
            trash.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, trash)
        return trash

    def accept(
        self, path: Path, manifest: Manifest, parts: Parts, reason: str, definitions: Mapping[str, str]
    ) -> Manifest:
        """Make an existing artifact valid for the key of `parts` too, with hard links and a manifest of its own."""
        key = key_of(parts)
        work = self.work(key)
        shutil.rmtree(work, ignore_errors=True)
        for name in manifest.files:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(path / name, work / name)
        stamped = replace(
            manifest, key=key, parts=parts, definitions=dict(definitions), accepted=reason, created=_now()
        )
        return self._install(work, stamped)


def _now() -> float:
    """Epoch seconds to the microsecond: a double holds no more digits, and a changed digit is to break the seal."""
    return round(time.time(), 6)


def _content_damage(path: Path, name: str, digest: str) -> str | None:
    try:
        same = file_sha256(path / name) == digest
    except OSError as error:
        return f"file {name} cannot be read: {error.strerror}"
    return None if same else f"file {name} has other contents than when it was made"


def _files(folder: Path) -> list[Path]:
    """Files that the manifest of an artifact lists. The log is left out: it still grows when the manifest is written.

    Views are drawn later, into the finished artifact, and are not listed either.
    """
    skipped = {folder / MANIFEST, folder / DAMAGE, folder / RECORD / "log.txt"}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in skipped)


def _environment() -> dict[str, Any]:
    """Python version, host platform and commit that an artifact was made with."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    head = repository.head()
    return found if head is None else found | {"commit": head.commit, "dirty": head.dirty}


def _flush_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
