"""Plan of a run: the state of every stage, and the reason."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.cache.differences import Target, lines, nearest
from pipeline.cache.keys import inside_parts, key_parts
from pipeline.cache.manifest import Manifest, ManifestError, key_of, read_manifest
from pipeline.cache.store import Cache
from pipeline.graph import Stage, inputs_read
from pipeline.project import DPAR, Project
from stages.runtime.errors import InputError

State = Literal["cached", "stale", "missing"]


@dataclass(frozen=True)
class StageStatus:
    """State of a stage under some settings.

    `stale`: an artifact was made with other settings, code or inputs, or it is damaged. `missing`: none was made. `key`
    and `path` are None until the inputs are finished.
    """

    stage: str
    state: State
    reason: str
    key: str | None
    path: Path | None


def plan(
    settings: Settings, runtime: RuntimeConfig, project: Project = DPAR, *, deep: bool = False
) -> list[StageStatus]:
    """State of every stage of the graph, in order.

    Args:
        settings: Settings of all stages.
        runtime: Runtime settings; `home` is the folder of the cache.
        project: Graph and code.
        deep: Check every image file; otherwise skip the files of unchanged folders.
    """
    return [status for status, _ in _survey(settings, runtime, project, deep=deep)]


def cached_paths(statuses: Iterable[StageStatus]) -> dict[str, Path]:
    """Artifacts of the cached stages, by stage."""
    return {status.stage: status.path for status in statuses if status.state == "cached" and status.path is not None}


def require_cached(settings: Settings, runtime: RuntimeConfig, names: Collection[str], command: str) -> dict[str, Path]:
    """Artifacts of the stages `names`, which must be cached. The error message suggests `command` to make them.

    Raises:
        InputError: A stage is not cached.
    """
    statuses = [status for status in plan(settings, runtime) if status.stage in names]
    missing = [status.stage for status in statuses if status.state != "cached"]
    if missing:
        raise InputError(f"not cached: {', '.join(missing)}: make them with `{command}` and the same settings")
    return cached_paths(statuses)


def target(stage: Stage, settings: Settings, runtime: RuntimeConfig, project: Project = DPAR) -> Target:
    """Parts and code that a stage would be made from under these settings."""
    return next(found for status, found in _survey(settings, runtime, project) if status.stage == stage.name)


def explain(stage: Stage, settings: Settings, runtime: RuntimeConfig, project: Project = DPAR) -> list[str]:
    """All changes since a stage's nearest artifact was made; empty if the stage is cached."""
    status, wanted = next(pair for pair in _survey(settings, runtime, project) if pair[0].stage == stage.name)
    if status.state == "cached":
        return []
    cache = Cache(runtime.home)
    if status.path is not None and status.path.exists():  # made with this key, and damaged since
        return [status.reason]
    return _changes(cache, stage, wanted) + _waits(wanted) or [status.reason]


def _survey(
    settings: Settings, runtime: RuntimeConfig, project: Project, *, deep: bool = False
) -> Iterator[tuple[StageStatus, Target]]:
    """State of every stage, and its target."""
    cache = Cache(runtime.home)
    digests: dict[str, str] = {}
    for stage in project.graph.values():
        inputs, code = inputs_read(stage, settings), project.fingerprint(stage, cache.home)
        unmade = tuple(name for name in inputs if name not in digests)
        known = {name: digests[name] for name in inputs if name in digests}
        if unmade:
            wanted = Target(inside_parts(stage, settings, known, code), code.definitions, unmade)
            yield _waiting_status(cache, stage, wanted), wanted
            continue
        parts = key_parts(stage, settings, cache.home, known, code, deep=deep)
        wanted = Target(parts, code.definitions)
        status, manifest = _status(cache, stage, wanted)
        if manifest is not None:
            digests[stage.name] = manifest.digest
        yield status, wanted


def _waiting_status(cache: Cache, stage: Stage, wanted: Target) -> StageStatus:
    state: State = "stale" if cache.manifests(stage.name) else "missing"
    reasons = _changes(cache, stage, wanted) + _waits(wanted)[:1]
    return StageStatus(stage.name, state, _summary(stage, reasons), None, None)


def _status(cache: Cache, stage: Stage, wanted: Target) -> tuple[StageStatus, Manifest | None]:
    key = key_of(wanted.parts)
    path = cache.path(key)
    if path.exists():
        try:
            manifest = read_manifest(path)
        except ManifestError as error:
            return StageStatus(stage.name, "stale", str(error), key, path), None
        damage = cache.damage(path, manifest)
        if damage is None:
            return StageStatus(stage.name, "cached", manifest.accepted or "unchanged", key, path), manifest
        return StageStatus(stage.name, "stale", damage, key, path), None
    reasons = _changes(cache, stage, wanted)
    if not reasons:
        reason = "its last run did not finish" if cache.work(key).exists() else "not made yet"
        return StageStatus(stage.name, "missing", reason, key, path), None
    return StageStatus(stage.name, "stale", _summary(stage, reasons), key, path), None


def _changes(cache: Cache, stage: Stage, wanted: Target) -> list[str]:
    """Differences from the nearest artifact; empty if there is none."""
    found = nearest(cache.manifests(stage.name), wanted)
    return [] if found is None else lines(found[1])


def _waits(wanted: Target) -> list[str]:
    return [f"waits for {name}" for name in wanted.unmade]


def _summary(stage: Stage, reasons: list[str]) -> str:
    more = f" (and {len(reasons) - 1} more: dpar why {stage.name})" if len(reasons) > 1 else ""
    return reasons[0] + more
