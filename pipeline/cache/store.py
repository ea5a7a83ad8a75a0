"""The one cache: finished artifacts by key, committed by a rename.

home/<stage>/<key>/     a finished artifact; manifest.json is written last, before the rename
home/.work/<key>/       one being made; it survives a kill, and the same key goes on in it
home/.locks/<key>.lock  held by whoever makes it; the kernel frees it when the last holder dies
home/.trash/            what a forced run has replaced, until `dpar gc`
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cache.keys import Parts, key_of
from stages.runtime.artifact import RECORD, read_json, remove_partials, write_json
from stages.runtime.errors import ArtifactError

MANIFEST = "manifest.json"
WORK, LOCKS, TRASH = ".work", ".locks", ".trash"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished artifact is, and how it came to be."""

    key: str
    stage: str
    parts: Parts
    digest: str
    """Of the contents, files in `record/` left out: what the keys of later stages hold."""
    files: dict[str, list[Any]]
    """Path to [bytes, sha256], `manifest.json` and `record/log.txt` aside."""
    created: float
    """Seconds since the epoch."""
    duration_s: float
    environment: dict[str, Any] = field(default_factory=dict)
    """Facts that are good to know and in no key: commit, host platform, Python."""
    accepted: str | None = None
    """Why the artifact stands under a key that it was not made for."""


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
        """Manifest of the artifact in a folder, None when there is none that can be read."""
        try:
            return Manifest(**read_json(path / MANIFEST))
        except (OSError, ValueError, TypeError):
            return None

    def damage(self, path: Path, manifest: Manifest) -> str | None:
        """The first thing wrong with the sizes of an artifact's files, None when nothing is."""
        return next((what for _, what in self.damages(path, manifest, deep=False)), None)

    def damages(self, path: Path, manifest: Manifest, *, deep: bool) -> Iterator[tuple[str, str]]:
        """Every file of an artifact that is not as it was made, and what is wrong with it. `deep` reads them all."""
        for name, (size, digest) in manifest.files.items():
            try:
                found = (path / name).stat().st_size
            except OSError:
                yield name, f"file {name} is missing"
                continue
            if found != size:
                yield name, f"file {name} has {found} bytes, expected {size}"
            elif deep and (what := _content_damage(path, name, digest)):
                yield name, what

    def manifests(self, stage: str) -> list[tuple[Path, Manifest]]:
        """Readable artifacts of a stage, newest first."""
        folders = [path for path in (self.home / stage).glob(f"{stage}-*") if path.is_dir()]
        found = [(path, manifest) for path in folders if (manifest := self.read(path))]
        return sorted(found, key=lambda pair: pair[1].created, reverse=True)

    @contextmanager
    def lock(self, key: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Hold the lock of a key; yields its file descriptor, for children to hold it too.

        A child that outlives a killed parent keeps the lock, so that no one else writes into its folder.
        """
        path = self.home / LOCKS / f"{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def is_locked(self, key: str) -> bool:
        """Whether someone is making the artifact of a key right now."""
        path = self.home / LOCKS / f"{key}.lock"
        if not path.exists():
            return False
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def commit(self, parts: Parts, duration_s: float) -> Manifest:
        """Turn the work folder of a key into its artifact; whatever stood in its place goes to the trash."""
        key = key_of(parts)
        work, path = self.work(key), self.path(key)
        remove_partials(work)
        files = {str(file.relative_to(work)): [file.stat().st_size, file_sha256(file)] for file in _files(work)}
        manifest = Manifest(
            key=key,
            stage=parts["stage"],
            parts=parts,
            digest=content_digest(files),
            files=files,
            created=time.time(),
            duration_s=round(duration_s, 3),
            environment=_environment(),
        )
        write_json(work / MANIFEST, asdict(manifest))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.discard(path)
        os.rename(work, path)
        _flush_folder(path.parent)
        return manifest

    def discard(self, path: Path) -> None:
        """Move a folder to the trash, if it is there."""
        if path.exists():
            trash = self.home / TRASH / f"{path.name}.{time.time_ns()}"
            trash.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, trash)

    def accept(self, path: Path, manifest: Manifest, parts: Parts, reason: str) -> Manifest:
        """Let an existing artifact stand for the key of `parts` too: hard links, and a manifest that says so."""
        key = key_of(parts)
        work = self.work(key)
        shutil.rmtree(work, ignore_errors=True)
        for name in manifest.files:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(path / name, work / name)
        stamped = asdict(manifest) | {"key": key, "parts": parts, "accepted": reason, "created": time.time()}
        write_json(work / MANIFEST, stamped)
        self.discard(self.path(key))
        self.path(key).parent.mkdir(parents=True, exist_ok=True)
        os.rename(work, self.path(key))
        return Manifest(**stamped)


def content_digest(files: dict[str, list[Any]]) -> str:
    """Digest over paths and contents, the record left out."""
    lines = [f"{name} {digest}" for name, (_, digest) in sorted(files.items()) if not name.startswith(f"{RECORD}/")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Digest of a file.

    Raises:
        ArtifactError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error


def _content_damage(path: Path, name: str, digest: str) -> str | None:
    try:
        same = file_sha256(path / name) == digest
    except ArtifactError as error:
        return str(error)
    return None if same else f"file {name} has other contents than when it was made"


def _files(folder: Path) -> list[Path]:
    """Files of an artifact that its manifest lists. The log goes on growing while it is listed, so it is not.

    Views are drawn later, into a finished artifact.
    """
    skipped = {folder / MANIFEST, folder / RECORD / "log.txt"}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in skipped)


def _environment() -> dict[str, Any]:
    """Where and from what an artifact was made."""
    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    root = Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return facts
    return facts | {"commit": done.stdout.strip()}


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
