"""Looking after the cache: verify what it holds, accept an artifact for the current code."""

from __future__ import annotations

import getpass
from dataclasses import dataclass
from pathlib import Path

from conf.schema import RuntimeConfig, Settings
from pipeline.cache.differences import changes, lines, nearest
from pipeline.cache.input_checks import is_chunk
from pipeline.cache.manifest import Manifest, ManifestError, key_of, read_manifest
from pipeline.cache.store import DAMAGE, Cache
from pipeline.graph import Stage
from pipeline.plan import target
from pipeline.project import DPAR, Project
from stages.runtime.errors import InputError

_MAY_DIFFER = {"code", "package"}  # between an artifact and what it is accepted for


@dataclass(frozen=True)
class Finding:
    """One artifact, and all that is wrong with it."""

    stage: str
    path: Path
    damages: list[str]


def verify(runtime: RuntimeConfig, *, deep: bool = False, project: Project = DPAR) -> list[Finding]:
    """Check every artifact's files against its manifest: their sizes, and with `deep` every byte.

    With `deep` also what the bytes say: checksums, entries never written, and whether stores and tables were made from
    each other as they claim. A damaged file is told of once, by array and chunk where it has them.
    """
    cache = Cache(runtime.home)
    by_content = {(name, manifest.digest): path for name in project.graph for path, manifest in cache.manifests(name)}
    findings = []
    for name in project.graph:
        for path in cache.artifacts(name):
            try:
                manifest = read_manifest(path)
            except ManifestError as error:
                findings.append(Finding(name, path, [str(error)]))
                continue
            damages = dict(cache.damages(path, manifest, deep=deep))
            if deep:
                inputs = manifest.parts["inputs"].items()
                damages |= _store_damages(path, [by_content[source] for source in inputs if source in by_content])
            if not damages and (what := cache.marked(path)):
                damages[DAMAGE] = f"marked as damaged when it was read: {what}"
            findings.append(Finding(name, path, list(damages.values())))
    return findings


def _store_damages(path: Path, sources: list[Path]) -> dict[str, str]:
    """What is wrong inside the stores and tables of an artifact, by file."""
    from stages.stores.verify import artifact_damage

    return {str(file.relative_to(path)): what for file, what in artifact_damage(path, sources)}


def accept(
    stage: Stage, settings: Settings, runtime: RuntimeConfig, project: Project = DPAR
) -> tuple[Manifest, list[str]]:
    """Mark an artifact as valid for the current code; returns it and the changes ignored.

    It is the newest whole one with the settings, inputs, outside files and schema of now: only its code and the
    versions of packages may be others.

    Raises:
        InputError: There is none, an input is not finished, or the stage is cached already.
    """
    cache = Cache(runtime.home)
    wanted = target(stage, settings, runtime, project)
    if wanted.unmade:
        raise InputError(f"{stage.name} reads {wanted.unmade[0]}, which is not finished: run that first, then accept")
    if cache.lookup(key_of(wanted.parts)) is not None:
        raise InputError(f"{stage.name} is cached already: there is nothing to accept")
    whole = [(path, manifest) for path, manifest in cache.manifests(stage.name) if _is_whole(cache, path, manifest)]
    if not whole:
        raise InputError(f"{stage.name} has no whole artifact to accept: run it, `dpar stage {stage.name}`")
    for path, manifest in whole:
        found = changes(manifest, wanted)
        if {change.kind for change in found} <= _MAY_DIFFER:
            ignored = lines(found)
            reason = f"accepted by {getpass.getuser()}; made as {manifest.key}; ignored: {'; '.join(ignored)}"
            with cache.lock(key_of(wanted.parts)):
                return cache.accept(path, manifest, wanted.parts, reason, wanted.definitions), ignored
    _, found = nearest(whole, wanted) or (None, [])
    differ = "; ".join(change.line for change in found if change.kind not in _MAY_DIFFER)
    raise InputError(
        f"no artifact of {stage.name} differs in code and packages alone, the nearest also in: {differ}; "
        f"run it, `dpar stage {stage.name}`"
    )


def _is_whole(cache: Cache, path: Path, manifest: Manifest) -> bool:
    """Every file holds what it was made with; chunks are as long, and checked as they are read."""
    if cache.damage(path, manifest) is not None:
        return False
    return next(cache.damages(path, manifest, deep=True, skip=is_chunk), None) is None
