"""Views of finished artifacts: drawn after the commit in a process of their own, and again when their code changed.

artifact/views/          what a stage's view has written: pictures, metrics.json
artifact/views/made.json  the code that drew them

A view is no part of its artifact: it is in no key and in no digest, and a view that fails costs the view alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from conf.schema import RuntimeConfig, Settings
from pipeline.cache.store import Cache
from pipeline.graph import Stage, inputs_read
from pipeline.launch import StageFailed, launch
from pipeline.plan import cached_paths, plan
from pipeline.project import DPAR, Project
from stages.images.sources import image_root
from stages.runtime.artifact import read_json, write_json
from stages.runtime.errors import InputError
from stages.runtime.job import Job

VIEWS, METRICS = "views", "metrics.json"
_MADE = "made.json"


def read_metrics(artifact: Path) -> dict[str, float]:
    """The numbers of an artifact's view; none while it is not drawn, or damaged."""
    return _metrics(artifact) or {}


def is_current(stage: Stage, artifact: Path, home: Path, project: Project = DPAR) -> bool:
    """Whether an artifact's view is whole and was drawn by the code of now; true for a stage that has none."""
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
    """Draw the view of a finished artifact in the place of the one that is there.

    Args:
        stage: Of `project.graph`.
        settings: Of the whole run.
        runtime: Where and how.
        artifact: The finished artifact.
        inputs: Artifacts of other stages, as far as they are cached.
        project: The graph and its code.

    Returns:
        Why it could not be drawn, None when it was.
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
    names: list[str], settings: Settings, runtime: RuntimeConfig, *, force: bool, project: Project = DPAR
) -> dict[str, str | None]:
    """Draw the views of cached artifacts that were not drawn by the code of now; with `force`, all of them.

    Returns:
        Each stage whose view was drawn anew, and why it could not be drawn.
    """
    artifacts, home = cached_paths(plan(settings, runtime, project)), Cache(runtime.home).home
    drawn = {}
    for stage in (project.graph[name] for name in names if name in artifacts):
        artifact = artifacts[stage.name]
        if project.has_view(stage) and (force or not is_current(stage, artifact, home, project)):
            drawn[stage.name] = draw(stage, settings, runtime, artifact, artifacts, project)
    return drawn


def view_inputs(stage: Stage, settings: Settings, artifacts: Mapping[str, Path]) -> dict[str, Path]:
    """What a view reads beside its own artifact, of what there is."""
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
    with contextlib.suppress(InputError, AttributeError):  # without the images, what can be drawn without them is drawn
        read["images"] = image_root(settings.dataset)
    return Job(
        stage=stage.name,
        config=section.model_dump(mode="json"),
        inputs=read,
        output=work,
        runtime=runtime.model_dump(mode="json"),
    )


def _metrics(artifact: Path) -> dict[str, float] | None:
    """The numbers of a view, None unless they are a flat object of numbers."""
    try:
        metrics = read_json(artifact / VIEWS / METRICS)
    except (OSError, ValueError):
        return None
    is_flat = isinstance(metrics, dict) and all(isinstance(value, (int, float)) for value in metrics.values())
    return metrics if is_flat else None
