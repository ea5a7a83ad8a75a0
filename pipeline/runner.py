"""Run a stage. The command line and the Prefect flow both call `run_stage`.

An artifact is committed before any server is told, so a server that is down never costs an artifact.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline import views
from pipeline.cache import input_checks, listing
from pipeline.cache.external import external_digest
from pipeline.cache.fingerprint import Fingerprint
from pipeline.cache.keys import key_parts
from pipeline.cache.manifest import Manifest, Parts, key_of
from pipeline.cache.store import Cache
from pipeline.graph import Stage, inputs_read
from pipeline.launch import StageFailed, launch, process_of
from pipeline.launchers import slurm
from pipeline.launchers.commands import Process
from pipeline.plan import StageStatus, cached_paths, plan
from pipeline.project import DPAR, Project
from stages.images.sources import image_root
from stages.runtime.errors import ArtifactError, InputError, StaleIndexError
from stages.runtime.job import Job

__all__ = ["NullObserver", "Observer", "StageResult", "StageStatus", "plan", "prepare", "run_stage", "tally"]


@dataclass(frozen=True)
class StageResult:
    """Result of `run_stage`. State "waited": another process was making the artifact and finished it."""

    stage: str
    state: Literal["cached", "ran", "waited"]
    key: str
    path: Path
    digest: str
    metrics: dict[str, float]
    duration_s: float
    view_error: str | None = None
    """Why the view of the artifact was not drawn; None if it was drawn or is current."""

    @property
    def outcome(self) -> Literal["made", "cached"]:
        """Whether this run has made the artifact."""
        return "made" if self.state == "ran" else "cached"


class Observer(Protocol):
    """Receives the events of a run, each after its effect is safe on disk. Methods must not raise."""

    def stage_waiting(self, stage: str, message: str) -> None:
        """Another process makes the stage's artifact, and the run waits for it. The message names the process."""

    def stage_started(self, stage: str, key: str, work: Path) -> None:
        """The stage's process is about to start in the folder `work`."""

    def stage_progress(self, stage: str, progress: dict[str, Any]) -> None:
        """The stage made progress; see `stages.runtime.progress`."""

    def stage_finished(self, result: StageResult) -> None:
        """The artifact exists: made, cached, or made by another process."""

    def stage_failed(self, stage: str, error: BaseException) -> None:
        """The stage failed or was stopped."""


class NullObserver:
    """An observer that does nothing."""

    def stage_waiting(self, stage: str, message: str) -> None:
        """Nothing."""

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
    """Make a stage's artifact unless it is cached.

    Args:
        stage: A stage of `project.graph`; its inputs must be finished.
        settings: Settings of all stages.
        runtime: Runtime settings.
        force: Make the artifact again. The old one stays in place until the new one is complete.
        observer: Receives the events of the run.
        project: Graph and code.

    Raises:
        InputError: An input is not finished, or a file named in the settings is missing or has changed since.
        ArtifactError: An input is damaged. It is marked, and the next run makes it again.
        StageFailed: The stage's process failed.
    """
    observer = observer or NullObserver()
    cache = Cache(runtime.home)
    inputs = _finished_inputs(stage, settings, runtime, project, cache)
    digests = {name: found.digest for name, found in inputs.items()}
    code = project.fingerprint(stage, cache.home)
    parts = key_parts(stage, settings, cache.home, digests, code, deep=True)
    key = key_of(parts)
    before = cache.lookup(key)
    waited: list[str] = []

    def wait(message: str) -> None:
        waited.append(message)
        observer.stage_waiting(stage.name, message)

    if before is None or force:
        with cache.lock(key, on_wait=wait) as lock:
            # Another process may have finished it before this one got the lock. A forced run accepts it only if it is
            # not the artifact found before.
            found = cache.lookup(key)
            if found is None or (force and found == before):
                run = _Run(stage, settings, runtime, project, cache, observer, code)
                result = run.make(parts, inputs, lock)
                observer.stage_finished(result)
                return result
            before = found
    path, view_error = cache.path(before.key), None
    if not views.is_current(stage, path, cache.home, project):
        view_error = views.draw(stage, settings, runtime, path, _cached_artifacts(settings, runtime, project), project)
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
    """Fingerprint of the stage's code, taken before the process starts."""

    def make(self, parts: Parts, inputs: dict[str, Manifest], lock: int) -> StageResult:
        """Run the process in the work folder of its key, then commit and draw the view."""
        name, key = self.stage.name, key_of(parts)
        work = self.cache.begin(parts)
        self.observer.stage_started(name, key, work)
        started, previews = time.monotonic(), _previews(self.stage, self.settings, self.runtime, self.project)
        try:
            read = [*(manifest.key for manifest in inputs.values()), *(path.name for path in previews.values())]
            with self.cache.reading(read) as reading:
                input_checks.require_undamaged(self.cache, name, inputs)
                self._require_external(parts, deep=True)
                self._launch(work, inputs, previews, lock, reading)
                input_checks.require_unchanged(self.cache, name, inputs)
                self._require_external(parts, deep=False)
                manifest = self.cache.commit(parts, time.monotonic() - started, self.code.definitions)
        except BaseException as error:
            self.observer.stage_failed(name, error)
            raise
        known = _cached_artifacts(self.settings, self.runtime, self.project)
        view_error = views.draw(self.stage, self.settings, self.runtime, self.cache.path(key), known, self.project)
        return _result(self.cache, manifest, "ran", view_error)

    def _launch(
        self,
        work: Path,
        inputs: dict[str, Manifest],
        previews: dict[str, Path],
        lock: int,
        reading: tuple[int, ...],
    ) -> None:
        """Run the process to its end. Damaged inputs and changed images that it reports are marked for the next run."""
        name, paths = self.stage.name, previews | _paths(self.cache, inputs)
        job = _job(self.stage, self.settings, self.runtime, work, paths)
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
                listing.distrust(job.inputs["images"], self.cache.home)
            if error.kind == ArtifactError.__name__:
                input_checks.mark_reported(self.cache, error.message, inputs)
            raise

    def _require_external(self, parts: Parts, *, deep: bool) -> None:
        """Check that imported weights match the key: the same bytes at the start, the same file at the end."""
        if self.stage.external in (None, "images"):
            return
        section = getattr(self.settings, self.stage.name)
        if external_digest(self.stage, section, self.cache.home, deep=deep) != parts["external"]:
            when = "since it was last read" if deep else f"while {self.stage.name} ran"
            raise InputError(
                f"{self.stage.name}.{self.stage.external} {getattr(section, str(self.stage.external))} has changed "
                f"{when}: no artifact was made, run again"
            )


def prepare(stage: Stage, settings: Settings, runtime: RuntimeConfig, project: Project = DPAR) -> Process:
    """Write the job file of a stage into its work folder, for a process that something else starts.

    `run_stage` then finds the finished work and commits it.

    Raises:
        InputError: An input is not finished, or a Slurm job is making the artifact.
    """
    cache = Cache(runtime.home)
    inputs = _finished_inputs(stage, settings, runtime, project, cache)
    digests = {name: found.digest for name, found in inputs.items()}
    parts = key_parts(stage, settings, cache.home, digests, project.fingerprint(stage, cache.home), deep=True)
    with cache.lock(key_of(parts)):
        paths = _previews(stage, settings, runtime, project) | _paths(cache, inputs)
        job = _job(stage, settings, runtime, cache.begin(parts), paths)
        process = process_of(stage.name, stage.entry[0], job, runtime, project.code_root, spmd=stage.spmd)
        slurm.require_no_job(process.record)
        process.prepare()
    return process


def _job(stage: Stage, settings: Settings, runtime: RuntimeConfig, work: Path, inputs: dict[str, Path]) -> Job:
    return Job(
        stage=stage.name,
        config=getattr(settings, stage.name).model_dump(mode="json"),
        inputs=inputs | ({"images": image_root(settings.dataset)} if stage.reads_images else {}),
        output=work,
        runtime=runtime.model_dump(mode="json"),
    )


def _previews(stage: Stage, settings: Settings, runtime: RuntimeConfig, project: Project) -> dict[str, Path]:
    """Cached artifacts that a stage reads only for pictures in its record."""
    known = _cached_artifacts(settings, runtime, project) if stage.previews_with else {}
    return {name: path for name, path in known.items() if name in stage.previews_with}


def _paths(cache: Cache, inputs: dict[str, Manifest]) -> dict[str, Path]:
    return {name: cache.path(manifest.key) for name, manifest in inputs.items()}


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
                f"run it first: `dpar run --until {name}`"
            )
        found[name] = manifest
    return found


def _cached_artifacts(settings: Settings, runtime: RuntimeConfig, project: Project) -> dict[str, Path]:
    """Artifacts cached under these settings, by stage."""
    return cached_paths(plan(settings, runtime, project))


def _result(
    cache: Cache, manifest: Manifest, state: Literal["cached", "ran", "waited"], view_error: str | None
) -> StageResult:
    path = cache.path(manifest.key)
    metrics = views.read_metrics(path)
    return StageResult(
        manifest.stage, state, manifest.key, path, manifest.digest, metrics, manifest.duration_s, view_error
    )


def tally(words: Iterable[str]) -> str:
    """How often each word occurs: `7 cached, 2 made`."""
    return ", ".join(f"{number} {word}" for word, number in Counter(words).items())
