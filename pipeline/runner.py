"""The one way to run a stage: the command line and Prefect both call `run_stage`.

An artifact is committed before any server hears of it, so a dead server costs nothing but the view.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from conf.schema import RuntimeConfig, Settings
from pipeline import views
from pipeline.cache import input_checks, listing
from pipeline.cache.external import external_digest
from pipeline.cache.fingerprint import Fingerprint
from pipeline.cache.keys import key_parts
from pipeline.cache.manifest import Manifest, Parts, key_of
from pipeline.cache.store import Cache
from pipeline.graph import Stage, inputs_read
from pipeline.launch import StageFailed, launch
from pipeline.plan import StageStatus, cached_paths, plan
from pipeline.project import DPAR, Project
from stages.images.sources import image_root
from stages.runtime.errors import ArtifactError, InputError, StaleIndexError
from stages.runtime.job import Job

__all__ = ["NullObserver", "Observer", "StageResult", "StageStatus", "plan", "run_stage"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """How a stage's artifact came to be there. "waited": another process was making it and finished."""

    stage: str
    state: Literal["cached", "ran", "waited"]
    key: str
    path: Path
    digest: str
    metrics: dict[str, float]
    duration_s: float
    view_error: str | None = None
    """Why the view of the artifact could not be drawn."""


class Observer(Protocol):
    """Is told what happens, after it is safe on disk. It must not raise."""

    def stage_started(self, stage: str, key: str, work: Path) -> None:
        """The stage's process is about to start in `work`."""

    def stage_progress(self, stage: str, progress: dict[str, Any]) -> None:
        """The stage has got further; see `stages.runtime.progress`."""

    def stage_finished(self, result: StageResult) -> None:
        """The artifact is there: made, found, or waited for."""

    def stage_failed(self, stage: str, error: BaseException) -> None:
        """The stage failed or was stopped."""


class NullObserver:
    """An observer that does nothing."""

    def stage_started(self, stage: str, key: str, work: Path) -> None:
        """Nothing."""

    def stage_progress(self, stage: str, progress: dict[str, Any]) -> None:
        """Nothing."""

    def stage_finished(self, result: StageResult) -> None:
        """Nothing."""

    def stage_failed(self, stage: str, error: BaseException) -> None:
        """Nothing."""


def run_stage(
    stage: Stage,
    settings: Settings,
    runtime: RuntimeConfig,
    *,
    force: bool = False,
    observer: Observer | None = None,
    project: Project = DPAR,
) -> StageResult:
    """Make a stage's artifact unless it is there.

    Args:
        stage: Of `project.graph`; its inputs must be finished.
        settings: Of the whole run.
        runtime: Where and how.
        force: Make it again; what is there stays until the new one is complete.
        observer: Is told of start, progress and end.
        project: The graph and its code.

    Raises:
        InputError: An input is not finished, or a file that the settings name is missing or has changed meanwhile.
        ArtifactError: An input is damaged; it is marked, so that the next run makes it again.
        StageFailed: The stage's process did not end well.
    """
    observer = observer or NullObserver()
    cache = Cache(runtime.home)
    inputs = _finished_inputs(stage, settings, runtime, project, cache)
    digests = {name: found.digest for name, found in inputs.items()}
    code = project.fingerprint(stage, cache.home)
    parts = key_parts(stage, settings, cache.home, digests, code, deep=True)
    key = key_of(parts)
    before = cache.lookup(key)
    waited: list[bool] = []
    if before is None or force:
        with cache.lock(key, on_wait=lambda: waited.append(_say_waiting(key))) as lock:
            # Someone may have finished it between the look and the lock; a forced run wants one made after it began.
            found = cache.lookup(key)
            if found is None or (force and found == before):
                run = _Run(stage, settings, runtime, project, cache, observer, code)
                result = run.make(parts, inputs, lock)
                observer.stage_finished(result)
                return result
            before = found
    path, view_error = cache.path(before.key), None
    if not views.is_current(stage, path, cache.home, project):
        view_error = views.draw(stage, settings, runtime, path, _known(settings, runtime, project), project)
    result = _result(cache, before, "waited" if waited else "cached", view_error)
    observer.stage_finished(result)
    return result


@dataclass(frozen=True)
class _Run:
    """One execution of a stage's process."""

    stage: Stage
    settings: Settings
    runtime: RuntimeConfig
    project: Project
    cache: Cache
    observer: Observer
    code: Fingerprint
    """Of the code that starts now."""

    def make(self, parts: Parts, inputs: dict[str, Manifest], lock: int) -> StageResult:
        """Run the process in the work folder of its key, then commit."""
        name, key = self.stage.name, key_of(parts)
        work = self.cache.begin(parts)
        self.observer.stage_started(name, key, work)
        started = time.monotonic()
        try:
            with self.cache.reading([manifest.key for manifest in inputs.values()]) as reading:
                input_checks.require_whole(self.cache, name, inputs)
                self._require_external(parts, deep=True)
                self._launch(work, inputs, lock, reading)
                input_checks.require_same(self.cache, name, inputs)
                self._require_external(parts, deep=False)
                manifest = self.cache.commit(parts, time.monotonic() - started, self.code.definitions)
        except BaseException as error:
            self.observer.stage_failed(name, error)
            raise
        known = _known(self.settings, self.runtime, self.project)
        view_error = views.draw(self.stage, self.settings, self.runtime, self.cache.path(key), known, self.project)
        return _result(self.cache, manifest, "ran", view_error)

    def _launch(self, work: Path, inputs: dict[str, Manifest], lock: int, reading: tuple[int, ...]) -> None:
        """Run the process to its end. What it found wrong with its inputs is kept for the next run."""
        paths = {name: self.cache.path(manifest.key) for name, manifest in inputs.items()}
        if self.stage.reads_images:
            paths["images"] = image_root(self.settings.dataset)
        name = self.stage.name
        job = Job(
            stage=name,
            config=getattr(self.settings, name).model_dump(mode="json"),
            inputs=paths,
            output=work,
            runtime=self.runtime.model_dump(mode="json"),
        )
        try:
            launch(
                name,
                self.stage.entry[0],
                job,
                self.runtime,
                code_root=self.project.code_root,
                locks=(lock, *reading),
                spmd=self.stage.spmd,
                on_progress=lambda progress: self.observer.stage_progress(name, progress),
            )
        except StageFailed as error:
            if error.kind == StaleIndexError.__name__:
                listing.distrust(paths["images"], self.cache.home)
            if error.kind == ArtifactError.__name__:
                input_checks.mark_reported(self.cache, error.message, inputs)
            raise

    def _require_external(self, parts: Parts, *, deep: bool) -> None:
        """Weights must be those that the key was made of: the same bytes at the start, the same file at the end."""
        if self.stage.external in (None, "images"):
            return
        section = getattr(self.settings, self.stage.name)
        if external_digest(self.stage, section, self.cache.home, deep=deep) != parts["external"]:
            when = "since it was last read" if deep else f"while {self.stage.name} ran"
            raise InputError(
                f"{self.stage.name}.{self.stage.external} {getattr(section, str(self.stage.external))} has changed "
                f"{when}: nothing was made of it, run again"
            )


def _finished_inputs(
    stage: Stage, settings: Settings, runtime: RuntimeConfig, project: Project, cache: Cache
) -> dict[str, Manifest]:
    names = inputs_read(stage, settings)
    statuses = {status.stage: status for status in plan(settings, runtime, project)} if names else {}
    found = {}
    for name in names:
        key = statuses[name].key
        manifest = cache.lookup(key) if key is not None else None
        if manifest is None:
            raise InputError(
                f"{stage.name} reads {name}, which is {statuses[name].state} ({statuses[name].reason}): "
                f"run it first, `dpar run --until {name}`"
            )
        found[name] = manifest
    return found


def _known(settings: Settings, runtime: RuntimeConfig, project: Project) -> dict[str, Path]:
    """All artifacts that are cached under these settings."""
    return cached_paths(plan(settings, runtime, project))


def _result(
    cache: Cache, manifest: Manifest, state: Literal["cached", "ran", "waited"], view_error: str | None
) -> StageResult:
    path = cache.path(manifest.key)
    metrics = views.read_metrics(path)
    return StageResult(
        manifest.stage, state, manifest.key, path, manifest.digest, metrics, manifest.duration_s, view_error
    )


def _say_waiting(key: str) -> bool:
    logger.warning("another process is making %s: waiting for it", key)
    return True
