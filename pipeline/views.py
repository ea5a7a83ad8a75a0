"""Views of finished artifacts, drawn in their own process after the commit and again when their code has changed.

artifact/views/           files of a stage's view: pictures, metrics.json
artifact/views/made.json  fingerprint of the code that drew them

A view is in no key and no content digest. If drawing it fails, the artifact is still valid.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.cache.store import Cache
from pipeline.graph import Stage, inputs_read
from pipeline.launch import StageFailed, launch
from pipeline.project import DPAR, Project
from stages.images.sources import image_root
from stages.runtime.artifact import read_json, write_json
from stages.runtime.errors import InputError
from stages.runtime.job import Job

VIEWS, METRICS = "views", "metrics.json"
_MADE = "made.json"


def read_metrics(artifact: Path) -> dict[str, float]:
    """Numbers of an artifact's view; empty if the view is not drawn or is damaged."""
    return _metrics(artifact) or {}


def is_current(stage: Stage, artifact: Path, home: Path, project: Project = DPAR) -> bool:
    """Whether an artifact's view is complete and was drawn by the current code; true for a stage without a view."""
    if not project.has_view(stage):
        return True
    try:
        made = read_json(artifact / VIEWS / _MADE)
    except (OSError, ValueError):
        return False
    drawn_by_this_code = made == {"code": project.view_fingerprint(stage, home).digests}
    return drawn_by_this_code and _metrics(artifact) is not None


def draw(
    stage: Stage,
    settings: Settings,
    runtime: RuntimeConfig,
    artifact: Path,
    inputs: Mapping[str, Path],
    project: Project = DPAR,
) -> str | None:
    """Draw the view of a finished artifact and replace the old view.

    Args:
        stage: A stage of `project.graph`.
        settings: Settings of all stages.
        runtime: Runtime settings.
        artifact: The finished artifact.
        inputs: Cached artifacts of other stages.
        project: Graph and code.

    Returns:
        Why the view was not drawn; None on success.
    """
    if not project.has_view(stage):
        return None
    cache = Cache(runtime.home)
    with cache.lock(f"{artifact.name}.{VIEWS}") as lock:
        work = cache.work(f"{artifact.name}.{VIEWS}")
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir(parents=True)
            launch(
                stage.name,
                stage.view_entry[0],
                _job(stage, settings, runtime, artifact, inputs, work),
                runtime,
                code_root=project.code_root,
                locks=(lock,),
            )
            write_json(work / _MADE, {"code": project.view_fingerprint(stage, cache.home).digests})
            old = artifact / VIEWS
            if old.exists():
                os.rename(old, work / "old")
            os.rename(work, old)
            shutil.rmtree(old / "old", ignore_errors=True)
        except StageFailed as error:
            return f"the view of {stage.name} was not drawn: {error.message} (log: {error.log})"
        except (OSError, InputError) as error:
            return f"the view of {stage.name} was not drawn: {error}"
    return None


def draw_all(
    names: list[str],
    settings: Settings,
    runtime: RuntimeConfig,
    artifacts: Mapping[str, Path],
    *,
    force: bool,
    project: Project = DPAR,
) -> dict[str, str | None]:
    """Draw the views of cached artifacts that are not current; with `force`, all views.

    Args:
        names: Stages whose views are wanted.
        settings: Settings of all stages.
        runtime: Runtime settings.
        artifacts: Cached artifacts of all stages.
        force: Draw current views too.
        project: Graph and code.

    Returns:
        For each stage whose view was drawn: None, or why drawing failed.
    """
    home = Cache(runtime.home).home
    drawn = {}
    for stage in (project.graph[name] for name in names if name in artifacts):
        artifact = artifacts[stage.name]
        if project.has_view(stage) and (force or not is_current(stage, artifact, home, project)):
            drawn[stage.name] = draw(stage, settings, runtime, artifact, artifacts, project)
    return drawn


def view_inputs(stage: Stage, settings: Settings, artifacts: Mapping[str, Path]) -> dict[str, Path]:
    """Artifacts of other stages that a view reads, as far as they exist."""
    names = {*inputs_read(stage, settings), *stage.shown_with}
    return {name: path for name, path in artifacts.items() if name in names}


def _job(
    stage: Stage,
    settings: Settings,
    runtime: RuntimeConfig,
    artifact: Path,
    inputs: Mapping[str, Path],
    work: Path,
) -> Job:
    section = getattr(settings, stage.name)
    read: dict[str, Path] = view_inputs(stage, settings, inputs) | {stage.name: artifact}
    with contextlib.suppress(InputError, AttributeError):  # the view then draws only what needs no images
        read["images"] = image_root(settings.dataset)
    return Job(
        stage=stage.name,
        config=section.model_dump(mode="json"),
        inputs=read,
        output=work,
        runtime=runtime.model_dump(mode="json"),
    )


def _metrics(artifact: Path) -> dict[str, float] | None:
    """Numbers of a view; None unless the file is a flat JSON object of numbers."""
    try:
        metrics = read_json(artifact / VIEWS / METRICS)
    except (OSError, ValueError):
        return None
    is_flat = isinstance(metrics, dict) and all(isinstance(value, (int, float)) for value in metrics.values())
    return metrics if is_flat else None
