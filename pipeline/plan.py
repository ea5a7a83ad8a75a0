"""What a run would do: the state of every stage, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf.schema import RuntimeConfig, Settings
from pipeline.cache.keys import Parts, changes, key_of, key_parts
from pipeline.cache.store import Cache, Manifest
from pipeline.graph import Stage, inputs_read
from pipeline.project import DPAR, Project
from stages.runtime.errors import InputError

State = Literal["cached", "stale", "missing"]


@dataclass(frozen=True)
class StageStatus:
    """State of a stage under some settings.

    `stale`: something like it was made, under other settings, code or inputs; `missing`: nothing was. Without finished
    inputs there is no key yet.
    """

    stage: str
    state: State
    reason: str
    key: str | None
    path: Path | None


def plan(settings: Settings, runtime: RuntimeConfig, project: Project = DPAR) -> list[StageStatus]:
    """State of every stage of the graph, in order."""
    cache = Cache(runtime.home)
    digests: dict[str, str] = {}
    statuses = []
    for stage in project.graph.values():
        inputs = inputs_read(stage, settings)
        waits = next((name for name in inputs if name not in digests), None)
        if waits is not None:
            state: State = "stale" if cache.manifests(stage.name) else "missing"
            statuses.append(StageStatus(stage.name, state, f"waits for {waits}", None, None))
            continue
        parts = key_parts(project, stage, settings, cache.home, {name: digests[name] for name in inputs})
        status, manifest = _status(cache, stage, parts)
        statuses.append(status)
        if manifest is not None:
            digests[stage.name] = manifest.digest
    return statuses


def cached_paths(statuses: Iterable[StageStatus]) -> dict[str, Path]:
    """Artifacts of the stages that are cached."""
    return {status.stage: status.path for status in statuses if status.state == "cached" and status.path is not None}


def require_cached(settings: Settings, runtime: RuntimeConfig, names: Collection[str], command: str) -> dict[str, Path]:
    """Artifacts of some stages, all of which must be cached; `command` would make them.

    Raises:
        InputError: One is not.
    """
    statuses = [status for status in plan(settings, runtime) if status.stage in names]
    missing = [status.stage for status in statuses if status.state != "cached"]
    if missing:
        raise InputError(f"not cached: {', '.join(missing)}: make them with `{command}` and the same settings")
    return cached_paths(statuses)


def current_parts(stage: Stage, settings: Settings, runtime: RuntimeConfig, project: Project = DPAR) -> Parts | None:
    """Parts of a stage's key under these settings, None while an input is not finished."""
    cache = Cache(runtime.home)
    by_name = {status.stage: status for status in plan(settings, runtime, project)}
    digests = {}
    for name in inputs_read(stage, settings):
        key = by_name[name].key
        manifest = cache.lookup(key) if key is not None else None
        if manifest is None:
            return None
        digests[name] = manifest.digest
    return key_parts(project, stage, settings, cache.home, digests)


def explain(stage: Stage, settings: Settings, runtime: RuntimeConfig, project: Project = DPAR) -> list[str]:
    """Every change between a stage's newest artifact and what it would be made from now; empty when it is cached."""
    status = next(status for status in plan(settings, runtime, project) if status.stage == stage.name)
    if status.state == "cached":
        return []
    parts = current_parts(stage, settings, runtime, project)
    made = Cache(runtime.home).manifests(stage.name)
    if parts is None or not made:
        return [status.reason]
    return changes(made[0][1].parts, parts) or [status.reason]


def _status(cache: Cache, stage: Stage, parts: Parts) -> tuple[StageStatus, Manifest | None]:
    key = key_of(parts)
    path = cache.path(key)
    manifest = cache.read(path)
    if manifest is not None:
        damage = cache.damage(path, manifest)
        if damage is None:
            return StageStatus(stage.name, "cached", manifest.accepted or "unchanged", key, path), manifest
        return StageStatus(stage.name, "stale", damage, key, path), None
    made = cache.manifests(stage.name)
    if not made:
        reason = "its last run did not finish" if cache.work(key).exists() else "not made yet"
        return StageStatus(stage.name, "missing", reason, key, path), None
    differences = changes(made[0][1].parts, parts) or ["its manifest is missing or cannot be read"]
    more = f" (and {len(differences) - 1} more: dpar why {stage.name})" if len(differences) > 1 else ""
    return StageStatus(stage.name, "stale", differences[0] + more, key, path), None
