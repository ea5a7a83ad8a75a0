"""Looking after the cache: verify what it holds, collect what nothing needs, accept an artifact as it is."""

from __future__ import annotations

import getpass
import shutil
from dataclasses import dataclass
from pathlib import Path

from conf.schema import RuntimeConfig, Settings
from pipeline.cache.keys import changes, key_of
from pipeline.cache.store import MANIFEST, TRASH, WORK, Cache, Manifest
from pipeline.graph import Stage
from pipeline.plan import current_parts, plan
from pipeline.project import DPAR, Project
from stages.runtime.errors import InputError


@dataclass(frozen=True)
class Finding:
    """One artifact, and all that is wrong with it."""

    stage: str
    path: Path
    damages: list[str]


@dataclass(frozen=True)
class Garbage:
    """A folder that nothing needs."""

    path: Path
    why: str
    bytes: int


def verify(runtime: RuntimeConfig, *, deep: bool = False, project: Project = DPAR) -> list[Finding]:
    """Check every artifact's files against its manifest: their sizes, and with `deep` every byte.

    With `deep` also what the bytes say: checksums, entries never written, and whether stores and tables were made from
    each other as they claim. A damaged file is told of once, by array and chunk where it has them.
    """
    cache = Cache(runtime.home)
    by_content = {(name, manifest.digest): path for name in project.graph for path, manifest in cache.manifests(name)}
    findings = []
    for stage in project.graph.values():
        for path in sorted((cache.home / stage.name).glob(f"{stage.name}-*")):
            manifest = cache.read(path)
            if manifest is None:
                findings.append(Finding(stage.name, path, [f"{MANIFEST} is missing or cannot be read"]))
                continue
            damages = dict(cache.damages(path, manifest, deep=deep))
            if deep:
                inputs = manifest.parts["inputs"].items()
                damages |= _store_damages(path, [by_content[source] for source in inputs if source in by_content])
            findings.append(Finding(stage.name, path, list(damages.values())))
    return findings


def _store_damages(path: Path, sources: list[Path]) -> dict[str, str]:
    """What is wrong inside the stores and tables of an artifact, by file."""
    from stages.stores.verify import artifact_damage

    return {str(file.relative_to(path)): what for file, what in artifact_damage(path, sources)}


def garbage(settings: Settings, runtime: RuntimeConfig, project: Project = DPAR) -> list[Garbage]:
    """What `collect` would remove: replaced and abandoned folders, and artifacts that no current one was made from.

    Kept are the artifacts of these settings, the newest of every stage, and everything that those were made from.
    """
    cache = Cache(runtime.home)
    made = {manifest.key: manifest for name in project.graph for _, manifest in cache.manifests(name)}
    needed = {status.key for status in plan(settings, runtime, project) if status.key is not None}
    newest = [cache.manifests(name)[:1] for name in project.graph]
    needed |= _with_sources({found[0][1].key for found in newest if found} | (needed & made.keys()), made)
    found = [Garbage(path, "replaced by a forced run", _size(path)) for path in _children(cache.home / TRASH)]
    abandoned = [path for path in _children(cache.home / WORK) if not cache.is_locked(path.name)]
    abandoned = [path for path in abandoned if path.name not in needed]
    found += [Garbage(path, "left by a run that did not finish", _size(path)) for path in abandoned]
    made_folders = [path for name in project.graph for path in _children(cache.home / name)]
    unneeded = [path for path in made_folders if path.name not in needed]
    return found + [Garbage(path, "nothing kept was made from it", _size(path)) for path in unneeded]


def collect(found: list[Garbage]) -> None:
    """Remove folders that `garbage` found, unless a run has taken one up since."""
    for entry in found:
        folder = entry.path.parent
        if folder.name != WORK or not Cache(folder.parent).is_locked(entry.path.name):
            shutil.rmtree(entry.path)


def accept(
    stage: Stage, settings: Settings, runtime: RuntimeConfig, project: Project = DPAR
) -> tuple[Manifest, list[str]]:
    """Let the newest artifact of a stage stand for the current settings and code; returns it and the changes ignored.

    Raises:
        InputError: There is none, it is damaged, an input is not finished, or it is current already.
    """
    cache = Cache(runtime.home)
    parts = current_parts(stage, settings, runtime, project)
    if parts is None:
        raise InputError(f"{stage.name} reads a stage that is not finished: run that first, then accept")
    if cache.lookup(key_of(parts)) is not None:
        raise InputError(f"{stage.name} is cached already: there is nothing to accept")
    usable = [(path, manifest) for path, manifest in cache.manifests(stage.name) if not cache.damage(path, manifest)]
    if not usable:
        raise InputError(f"{stage.name} has no whole artifact to accept: run it, `dpar stage {stage.name}`")
    path, manifest = usable[0]
    ignored = changes(manifest.parts, parts)
    reason = f"accepted by {getpass.getuser()} in place of a run; made as {manifest.key}; ignored: {'; '.join(ignored)}"
    with cache.lock(key_of(parts)):
        return cache.accept(path, manifest, parts, reason), ignored


def _with_sources(keys: set[str], made: dict[str, Manifest]) -> set[str]:
    """Keys, and those of the artifacts that they were made from, told by their content digests."""
    by_content: dict[tuple[str, str], set[str]] = {}
    for manifest in made.values():
        by_content.setdefault((manifest.stage, manifest.digest), set()).add(manifest.key)
    reached: set[str] = set()
    waiting = set(keys)
    while waiting:
        key = waiting.pop()
        if key in made and key not in reached:
            reached.add(key)
            for source in made[key].parts["inputs"].items():
                waiting |= by_content.get(source, set())
    return reached


def _children(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
