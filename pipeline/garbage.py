"""Garbage collection: folders of the cache that nothing needs, the reason, and the nearest preset of each.

Only folders that the cache itself made are listed: real folders named by a key, in the real folder of their stage, with
a valid manifest. Anything else below home belongs to the user and is never listed.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import time as now

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.cache.differences import flat
from pipeline.cache.fingerprint import FingerprintError
from pipeline.cache.manifest import Manifest, ManifestError, Parts, read_manifest, stage_of
from pipeline.cache.store import PARTS, TRASH, WORK, Cache
from pipeline.graph import Stage
from pipeline.launchers import slurm
from pipeline.plan import plan
from pipeline.project import DPAR, Project
from stages.runtime.artifact import RECORD, read_json
from stages.runtime.errors import InputError

RUNS = ".servers/runs"  # one file for each key that has an MLflow run
DAY_S = 24 * 60 * 60
_REPLACED = re.compile(r"(.+)\.\d+")
_SHOWN = 2  # settings shown for each artifact


@dataclass(frozen=True)
class Garbage:
    """A folder that nothing needs."""

    path: Path
    key: str
    why: str
    bytes: int
    belongs: str
    """The nearest preset and the settings that differ from it; empty if unknown."""


@dataclass(frozen=True)
class Found:
    """Result of `find_garbage`."""

    garbage: list[Garbage]
    left_alone: list[tuple[Path, str]]
    """Folders named by a key whose manifest is invalid, and the reason. They are not removed."""


def find_garbage(
    settings: Settings,
    runtime: RuntimeConfig,
    presets: Mapping[str, Settings],
    *,
    older_than_s: float,
    project: Project = DPAR,
) -> Found:
    """List the folders that `collect` would remove.

    Kept are the artifacts of these settings and of all presets, artifacts made, tracked or worked on recently, and
    everything that any of these were made from. Artifacts that a running process makes or reads are not listed.

    Args:
        settings: Settings of all stages.
        runtime: Runtime settings; `home` is the folder of the cache.
        presets: Settings of the presets by name.
        older_than_s: Age in seconds; younger artifacts are kept.
        project: Graph and code.
    """
    search = _Search(Cache(runtime.home), project, presets, now() - older_than_s)
    needed = search.needed([settings, *presets.values()], runtime)
    found = [*search.replaced(), *search.unfinished(needed), *search.unneeded(needed)]
    return Found([entry for entry in found if not search.cache.is_busy(entry.key)], search.left_alone)


def collect(home: Path, found: Iterable[Garbage]) -> list[Garbage]:
    """Remove what `find_garbage` found, except artifacts that are in use by now. Returns what was removed."""
    cache = Cache(home)
    removed = []
    for entry in found:
        with cache.exclusive(entry.key) as free:
            if free and _is_real_folder(entry.path):
                # Rename first: an interrupted removal must not leave half an artifact in place.
                in_place = entry.path.parent.name not in (WORK, TRASH)
                shutil.rmtree(cache.discard(entry.path) if in_place else entry.path)
                removed.append(entry)
    return removed


class _Search:
    """One search of a cache for garbage."""

    def __init__(self, cache: Cache, project: Project, presets: Mapping[str, Settings], cutoff: float) -> None:
        self.cache, self.project, self.presets, self.cutoff = cache, project, presets, cutoff
        self.left_alone: list[tuple[Path, str]] = []
        self.own: dict[Path, Manifest] = {}
        for name in project.graph:
            for path in _real_folders(cache.home / name):
                if stage_of(path.name) == name:
                    self._take(path)
        # Artifacts that a user moved elsewhere and linked to are never removed, but count as sources.
        self.made = {manifest.key: manifest for name in project.graph for _, manifest in cache.manifests(name)}
        self._by_content: dict[tuple[str, str], set[str]] = {}
        for manifest in self.made.values():
            self._by_content.setdefault((manifest.stage, manifest.digest), set()).add(manifest.key)

    def _take(self, path: Path) -> None:
        try:
            self.own[path] = read_manifest(path)
        except ManifestError as error:
            self.left_alone.append((path, str(error)))

    def needed(self, wanted: Iterable[Settings], runtime: RuntimeConfig) -> set[str]:
        """Keys of the artifacts that are kept."""
        waiting = {key for settings in wanted for key in self._keys(settings, runtime)} | self._recent()
        for path in self._recent_work():
            waiting |= {path.name}
            parts = _parts_of_work(path)
            waiting |= {key for source in _inputs(parts) for key in self._sources(source)}
        reached: set[str] = set()
        while waiting:
            key = waiting.pop()
            if key not in reached:
                reached.add(key)
                sources = _inputs(self.made[key].parts) if key in self.made else []
                waiting |= {other for source in sources for other in self._sources(source)}
        return reached

    def _keys(self, settings: Settings, runtime: RuntimeConfig) -> Iterator[str]:
        """Keys of the artifacts of these settings: the cached one of each stage, else all with the stage's settings."""
        try:
            statuses = {status.stage: status for status in plan(settings, runtime, self.project)}
        except (InputError, FingerprintError, OSError):  # e.g. a preset whose image root does not exist here
            statuses = {}
        for stage in self.project.graph.values():
            status = statuses.get(stage.name)
            if status is not None and status.key is not None:
                yield status.key
            if status is None or status.state != "cached":
                yield from (
                    manifest.key
                    for manifest in self.made.values()
                    if manifest.stage == stage.name and self._is_of(manifest, settings)
                )

    def _is_of(self, manifest: Manifest, settings: Settings) -> bool:
        """Whether an artifact, and everything it was made from that still exists, has these settings."""
        if manifest.parts["settings"] != getattr(settings, manifest.stage).key_fields():
            return False
        sources = [self._sources(source) for source in _inputs(manifest.parts)]
        return all(not keys or any(self._is_of(self.made[key], settings) for key in keys) for keys in sources)

    def _sources(self, source: tuple[str, str]) -> set[str]:
        """Keys of the artifacts with the stage and content digest `source`."""
        return self._by_content.get(source, set())

    def _recent(self) -> set[str]:
        """Keys of artifacts made or tracked recently."""
        made = {key for key, manifest in self.made.items() if manifest.created >= self.cutoff}
        runs = self.cache.home / RUNS
        return made | {path.stem for path in runs.glob("*.json") if path.lstat().st_mtime >= self.cutoff}

    def _work(self) -> list[Path]:
        return [path for path in _real_folders(self.cache.home / WORK) if stage_of(path.name) in self.project.graph]

    def _recent_work(self) -> list[Path]:
        """Work folders that a run used recently, or in which a Slurm job may still run."""
        return [path for path in self._work() if _newest(path) >= self.cutoff or slurm.may_run(path / RECORD)]

    def replaced(self) -> Iterator[Garbage]:
        """Artifacts that forced runs have replaced."""
        for path in _real_folders(self.cache.home / TRASH):
            match = _REPLACED.fullmatch(path.name)
            if match and stage_of(match[1]) in self.project.graph:
                yield self._garbage(path, match[1], "replaced by a forced run", _parts_of(path, match[1]))

    def unfinished(self, needed: set[str]) -> Iterator[Garbage]:
        """Work folders of unfinished runs."""
        for path in self._work():
            if path.name not in needed:
                yield self._garbage(path, path.name, "left by an unfinished run", _parts_of_work(path))

    def unneeded(self, needed: set[str]) -> Iterator[Garbage]:
        """Artifacts that are not needed."""
        for path, manifest in self.own.items():
            if manifest.key not in needed:
                yield self._garbage(path, manifest.key, "no kept artifact was made from it", manifest.parts)

    def _garbage(self, path: Path, key: str, why: str, parts: Parts | None) -> Garbage:
        stage = self.project.graph[str(stage_of(key))]
        return Garbage(path, key, why, _size(path), "" if parts is None else self._belongs(stage, parts))

    def _belongs(self, stage: Stage, parts: Parts) -> str:
        """Nearest presets and the settings that differ, e.g. `preset tiny with training.steps=5`."""
        own = flat(parts["settings"])
        found: dict[str, list[str]] = {}
        for name, preset in self.presets.items():
            theirs = flat(getattr(preset, stage.name).key_fields())
            names = sorted(own.keys() | theirs.keys())
            found[name] = [each for each in names if (each in own, own.get(each)) != (each in theirs, theirs.get(each))]
        if not found:
            return ""
        fewest = min(map(len, found.values()))
        nearest = [name for name, differ in found.items() if len(differ) == fewest]
        differ = [f"{name}={own.get(name, 'absent')}" for name in found[nearest[0]]]
        more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        shown = f" with {', '.join(differ[:_SHOWN])}{more}" if differ else ""
        return f"preset {nearest[0] if shown else ', '.join(nearest)}{shown}"


def _inputs(parts: Parts | None) -> list[tuple[str, str]]:
    """Stage and content digest of each input."""
    inputs = parts.get("inputs") if isinstance(parts, dict) else None
    return [(name, str(digest)) for name, digest in inputs.items()] if isinstance(inputs, dict) else []


def _parts_of(path: Path, key: str) -> Parts | None:
    try:
        return read_manifest(path, key).parts
    except ManifestError:
        return None


def _parts_of_work(path: Path) -> Parts | None:
    """Parts of the key of a work folder; None if unknown."""
    try:
        parts = read_json(path / PARTS)
    except (OSError, ValueError):
        return None
    return parts if isinstance(parts, dict) and isinstance(parts.get("settings"), dict) else None


def _real_folders(parent: Path) -> list[Path]:
    """Subfolders sorted by name, without symbolic links; empty if `parent` itself is a link."""
    if not _is_real_folder(parent):
        return []
    with os.scandir(parent) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))


def _is_real_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _stats(folder: Path) -> Iterator[os.stat_result]:
    """`lstat` of a folder and everything below it; links are not followed."""
    for place, folders, names in os.walk(folder):
        for name in [".", *folders, *names]:
            try:
                yield os.lstat(os.path.join(place, name))
            except OSError:  # removed in the meantime
                continue


def _size(folder: Path) -> int:
    return sum(found.st_size for found in _stats(folder) if stat.S_ISREG(found.st_mode))


def _newest(folder: Path) -> float:
    return max((found.st_mtime for found in _stats(folder)), default=0.0)
