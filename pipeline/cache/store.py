"""The one cache: finished artifacts by key, committed by a rename.

home/<stage>/<key>/        a finished artifact; manifest.json is written last, before the rename
home/.work/<key>/          one being made; it survives a kill, and the same key resumes in it
home/.locks/<key>.lock     held by whoever makes it; the kernel frees it when the last holder dies
home/.locks/<key>.readers  shared by the runs that read it, so that nobody removes it meanwhile
home/.trash/               what a forced run has replaced, until `dpar gc`
"""

from __future__ import annotations

import fcntl
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

DAMAGE = "damage.json"  # beside a manifest: what was found damaged when the artifact was read
PARTS = f"{RECORD}/parts.json"  # in a work folder: what its key was made of
WORK, LOCKS, TRASH = ".work", ".locks", ".trash"


class Cache:
    """Artifacts below one root folder."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()

    def path(self, key: str) -> Path:
        """Where the artifact of a key lies, finished or not."""
        return self.home / key.partition("-")[0] / key

    def work(self, key: str) -> Path:
        """Where it is made."""
        return self.home / WORK / key

    def lookup(self, key: str) -> Manifest | None:
        """Manifest of a finished artifact; None unless every file it lists is there with its size."""
        manifest = self.read(self.path(key))
        return None if manifest is None or self.damage(self.path(key), manifest) else manifest

    def read(self, path: Path) -> Manifest | None:
        """Manifest of the artifact in a folder, None when there is none that can be trusted."""
        try:
            return read_manifest(path)
        except ManifestError:
            return None

    def damage(self, path: Path, manifest: Manifest) -> str | None:
        """What is wrong with an artifact: as it was marked, else the first file of another size; None if nothing."""
        return self.marked(path) or next((what for _, what in self.damages(path, manifest, deep=False)), None)

    def damages(
        self, path: Path, manifest: Manifest, *, deep: bool, skip: Callable[[str], bool] = lambda name: False
    ) -> Iterator[tuple[str, str]]:
        """Every file of an artifact that is not as it was made, and what is wrong with it.

        Args:
            path: Its folder.
            manifest: What it must hold.
            deep: Read the files too, except those that `skip` is true of.
            skip: Given a file's name.
        """
        for name, (size, digest) in manifest.files.items():
            try:
                found = (path / name).lstat()
            except OSError:
                yield name, f"file {name} is missing"
                continue
            if not stat.S_ISREG(found.st_mode):
                yield name, f"{name} is no regular file"
            elif found.st_size != size:
                yield name, f"file {name} has {found.st_size} bytes, expected {size}"
            elif deep and not skip(name) and (what := _content_damage(path, name, digest)):
                yield name, what

    def mark(self, path: Path, what: str) -> None:
        """Let an artifact count as damaged until it is made again."""
        write_json(path / DAMAGE, {"what": what, "found": time.time()})

    def marked(self, path: Path) -> str | None:
        """What an artifact was marked with, None if it was not."""
        try:
            return str(read_json(path / DAMAGE)["what"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError):
            return "it was marked as damaged"

    def artifacts(self, stage: str) -> list[Path]:
        """Folders named as the artifacts of a stage are, by name. Whatever else lies there is not ours."""
        try:
            with os.scandir(self.home / stage) as entries:
                return sorted(Path(each.path) for each in entries if stage_of(each.name) == stage and each.is_dir())
        except OSError:
            return []

    def manifests(self, stage: str) -> list[tuple[Path, Manifest]]:
        """Artifacts of a stage whose manifest can be trusted, newest first."""
        found = [(path, manifest) for path in self.artifacts(stage) if (manifest := self.read(path))]
        return sorted(found, key=lambda pair: pair[1].created, reverse=True)

    @contextmanager
    def lock(self, key: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Hold the lock of a key; yields its file descriptor, for children to hold it too.

        A child that outlives a killed parent keeps the lock, so that no one else writes into its folder.
        """
        descriptor = self._open_lock(f"{key}.lock")
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def reading(self, keys: Collection[str]) -> Iterator[tuple[int, ...]]:
        """Keep artifacts from being removed; yields the locks' file descriptors, for children to hold them too."""
        with ExitStack() as stack:
            descriptors = []
            for key in sorted(keys):
                descriptors.append(self._open_lock(f"{key}.readers"))
                stack.callback(os.close, descriptors[-1])
                fcntl.flock(descriptors[-1], fcntl.LOCK_SH)
            yield tuple(descriptors)

    @contextmanager
    def alone(self, key: str) -> Iterator[bool]:
        """Whether nobody makes or reads the artifact of a key; if so, nobody can begin to until the end."""
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
        """Whether someone is making the artifact of a key right now."""
        return self._is_held(f"{key}.lock")

    def is_busy(self, key: str) -> bool:
        """Whether someone is making or reading the artifact of a key right now."""
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
        """The work folder of a key, which says what the key was made of. Its lock must be held."""
        work = self.work(key_of(parts))
        work.mkdir(parents=True, exist_ok=True)
        remove_partials(work)  # as large as checkpoints
        write_json(work / PARTS, parts)
        return work

    def commit(self, parts: Parts, duration_s: float, definitions: Mapping[str, str] | None = None) -> Manifest:
        """Turn the work folder of a key into its artifact; whatever stood in its place goes to the trash.

        Raises:
            ArtifactError: A file has a name that a manifest cannot hold.
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
            created=time.time(),
            duration_s=round(duration_s, 3),
            environment=_environment(),
        )
        return self._install(work, manifest)

    def _install(self, work: Path, manifest: Manifest) -> Manifest:
        """Write the manifest and give the folder its name."""
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
        """Move a folder to the trash, if it is there; returns its place there."""
        trash = self.home / TRASH / f"{path.name}.{time.time_ns()}"
        if os.path.lexists(path):
            trash.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, trash)
        return trash

    def accept(
        self, path: Path, manifest: Manifest, parts: Parts, reason: str, definitions: Mapping[str, str]
    ) -> Manifest:
        """Let an existing artifact stand for the key of `parts` too: hard links, and a manifest that says so."""
        key = key_of(parts)
        work = self.work(key)
        shutil.rmtree(work, ignore_errors=True)
        for name in manifest.files:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(path / name, work / name)
        stamped = replace(
            manifest, key=key, parts=parts, definitions=dict(definitions), accepted=reason, created=time.time()
        )
        return self._install(work, stamped)


def _content_damage(path: Path, name: str, digest: str) -> str | None:
    try:
        same = file_sha256(path / name) == digest
    except OSError as error:
        return f"file {name} cannot be read: {error.strerror}"
    return None if same else f"file {name} has other contents than when it was made"


def _files(folder: Path) -> list[Path]:
    """Files of an artifact that its manifest lists. The log goes on growing while it is listed, so it is not.

    Views are drawn later, into a finished artifact.
    """
    skipped = {folder / MANIFEST, folder / DAMAGE, folder / RECORD / "log.txt"}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in skipped)


def _environment() -> dict[str, Any]:
    """Where and from what an artifact was made."""
    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    head = repository.head()
    return facts if head is None else facts | {"commit": head.commit, "dirty": head.dirty}


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
