"""Maintenance of the cache: verify its artifacts, accept an artifact for the current code."""

from __future__ import annotations

import getpass
from dataclasses import dataclass
from pathlib import Path

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.cache.differences import changes, lines, nearest
from pipeline.cache.input_checks import is_chunk
from pipeline.cache.manifest import Manifest, ManifestError, key_of, read_manifest
from pipeline.cache.store import DAMAGE, Cache
from pipeline.graph import Stage
from pipeline.launchers import slurm
from pipeline.plan import target
from pipeline.project import DPAR, Project
from stages.runtime.artifact import RECORD
from stages.runtime.errors import InputError

_MAY_DIFFER = {"code", "package"}  # kinds of change that `accept` ignores


@dataclass(frozen=True)
class Finding:
    """One artifact and its damages."""

    stage: str
    path: Path
    damages: list[str]


def verify(runtime: RuntimeConfig, *, deep: bool = False, project: Project = DPAR) -> list[Finding]:
    """Check the files of every artifact against its manifest: their sizes and, with `deep`, every byte.

    With `deep`, stores and tables are decoded as well: checksums, rows never written, and whether they were made from
    each other as recorded. Each damaged file is reported once, by array and chunk where possible.
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
    """Damage inside the stores and tables of an artifact, by file."""
    from stages.stores.verify import artifact_damage

    return {str(file.relative_to(path)): what for file, what in artifact_damage(path, sources)}


def accept(
    stage: Stage, settings: Settings, runtime: RuntimeConfig, project: Project = DPAR
) -> tuple[Manifest, list[str]]:
    """Mark an artifact as valid for the current code. Returns its manifest and the ignored changes.

    The newest undamaged artifact with the current settings, inputs, external files and schema is chosen. Only its code
    and package versions may differ.

    Raises:
        InputError: There is no such artifact, an input is not finished, or the stage is already cached.
    """
    cache = Cache(runtime.home)
    wanted = target(stage, settings, runtime, project)
    if wanted.unmade:
        raise InputError(f"{stage.name} reads {wanted.unmade[0]}, which is not finished: run that first, then accept")
    if cache.lookup(key_of(wanted.parts)) is not None:
        raise InputError(f"{stage.name} is already cached: there is nothing to accept")
    undamaged = [
        (path, manifest) for path, manifest in cache.manifests(stage.name) if _is_undamaged(cache, path, manifest)
    ]
    if not undamaged:
        raise InputError(f"{stage.name} has no undamaged artifact to accept: run it with `dpar stage {stage.name}`")
    for path, manifest in undamaged:
        found = changes(manifest, wanted)
        if {change.kind for change in found} <= _MAY_DIFFER:
            ignored = lines(found)
            reason = f"accepted by {getpass.getuser()}; made as {manifest.key}; ignored: {'; '.join(ignored)}"
            with cache.lock(key_of(wanted.parts)):
                slurm.require_no_job(cache.work(key_of(wanted.parts)) / RECORD)
                return cache.accept(path, manifest, wanted.parts, reason, wanted.definitions), ignored
    _, found = nearest(undamaged, wanted) or (None, [])
    differ = "; ".join(change.line for change in found if change.kind not in _MAY_DIFFER)
    raise InputError(
        f"no artifact of {stage.name} differs only in code and packages; the nearest also differs in: {differ}; "
        f"run it with `dpar stage {stage.name}`"
    )


def _is_undamaged(cache: Cache, path: Path, manifest: Manifest) -> bool:
    """Whether the artifact is undamaged. Only the sizes of Zarr chunks are checked; their CRC is checked when read."""
    if cache.damage(path, manifest) is not None:
        return False
    return next(cache.damages(path, manifest, deep=True, skip=is_chunk), None) is None
