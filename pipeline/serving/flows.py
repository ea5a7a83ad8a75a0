"""The graph as a Prefect flow. Beside it only `prefect_app.py` imports Prefect.

Each stage is a task that calls `run_stage`. Prefect's own caching and result storage are off: the artifact cache alone
decides what is cached, and the task of a cached stage ends in the state `Cached`. This module has no
`from __future__ import annotations`, since Prefect builds its forms from real annotations.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import prefect
from prefect import Task, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.deployments.runner import RunnerDeployment
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.types.entrypoint import EntrypointType
from pydantic import Field

from conf.load import SettingsError, load_settings, names
from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.budget.advice import advice
from pipeline.enough import repeated_images, require_enough
from pipeline.graph import STAGES, Stage, inputs_read
from pipeline.launch import StageFailed
from pipeline.plan import cached_paths, plan
from pipeline.runner import NullObserver, Observer, run_stage
from pipeline.selection import as_options, select, selected_statuses
from pipeline.serving.page import load_page_settings
from pipeline.serving.relay import CompositeObserver, LogRelay
from pipeline.tracking.tracker import Tracker
from stages.runtime.errors import ArtifactError, InputError

# Prefect's form shows these as drop-down lists, and its server rejects other values. The form has no list for
# `str | None`, so None has a name: BASE and UNCHANGED.
BASE, UNCHANGED = "base", "none"
FIRST, *_, LAST = STAGES
Preset = Annotated[str, Field(json_schema_extra={"enum": list[Any]([BASE, *names("preset")])})]
Ablation = Annotated[str, Field(json_schema_extra={"enum": list[Any]([UNCHANGED, *names("ablation")])})]
StageName = Annotated[str, Field(json_schema_extra={"enum": list[Any](STAGES)})]

# Errors whose message is enough; they are reported without a traceback.
EXPECTED_ERRORS = (SettingsError, InputError, ArtifactError, StageFailed)
SCREEN: ContextVar[Observer] = ContextVar("SCREEN")  # set by the command line when it runs the flow in its own process


def _run_name() -> str:
    """Name of a run in lists: its stage, preset, ablation and overrides."""
    given = flow_run.parameters
    changes = [text for text in given["overrides"] if not text.startswith("runtime.")]
    ablation = "" if given["ablation"] == UNCHANGED else given["ablation"]
    return " ".join(word for word in (given.get("stage"), given["preset"], ablation, *changes) if word)


@flow(name="dpar-pipeline", flow_run_name=_run_name, persist_result=False)
def pipeline_flow(
    preset: Preset = "demo",
    ablation: Ablation = UNCHANGED,
    overrides: list[str] = [],  # noqa: B006 - Prefect copies it, and shows it in the form
    from_stage: StageName = FIRST,
    until_stage: StageName = LAST,
    force: list[StageName] = [],  # noqa: B006
    dry_run: bool = False,
) -> State[Any]:
    """Run all stages that are not cached, in the order of the graph.

    Args:
        preset: Named settings to start from; base is the paper's.
        ablation: Named change to the preset.
        overrides: Single settings, each as stage.field=value.
        from_stage: First stage to run; its inputs must be cached.
        until_stage: Last stage to run.
        force: Stages to run even if they are cached.
        dry_run: Only show which stages would run, and why.
    """
    return _run(
        preset,
        ablation,
        overrides,
        from_stage=from_stage,
        until_stage=until_stage,
        force=force,
        dry_run=dry_run,
    )


@flow(name="dpar-stage", flow_run_name=_run_name, persist_result=False)
def stage_flow(
    stage: StageName,
    preset: Preset = "demo",
    ablation: Ablation = UNCHANGED,
    overrides: list[str] = [],  # noqa: B006 - Prefect copies it, and shows it in the form
    force: bool = False,
) -> State[Any]:
    """Run one stage.

    Args:
        stage: Stage to run; its inputs must be cached.
        preset: Named settings to start from; base is the paper's.
        ablation: Named change to the preset.
        overrides: Single settings, each as stage.field=value.
        force: Run the stage even if it is cached.
    """
    forced = [stage] if force else []
    return _run(preset, ablation, overrides, from_stage=stage, until_stage=stage, force=forced)


def run_here(parameters: Mapping[str, Any], screen: Observer) -> None:
    """Run the pipeline flow in this process.

    Args:
        parameters: Parameters of `pipeline_flow`; None stands for the default.
        screen: Observer of the run.

    Raises:
        SettingsError: The settings are invalid.
        InputError: A selected stage cannot run, or a file named in the settings is missing.
        StageFailed: A stage's process failed.
    """
    given = {"preset": BASE} | {name: value for name, value in parameters.items() if value is not None}
    token = SCREEN.set(screen)
    try:
        state: State[Any] = pipeline_flow(**given, return_state=True)
    finally:
        SCREEN.reset(token)
        _send_logs()
    state.result(raise_on_failure=True)


def _send_logs() -> None:
    """Flush Prefect's logs. A thread sends them, and a temporary server may stop before it does."""
    for handler in logging.getLogger("prefect.flow_runs").handlers:
        handler.flush()


def serve() -> None:
    """Execute runs requested on Prefect's page, one at a time, until this process is terminated."""
    deployments = [
        RunnerDeployment.from_flow(each, name="local", entrypoint_type=EntrypointType.MODULE_PATH)
        for each in (pipeline_flow, stage_flow)
    ]
    prefect.serve(*deployments, limit=1, print_starting_message=False)


def _run(
    preset: str,
    ablation: str,
    overrides: list[str],
    *,
    from_stage: str,
    until_stage: str,
    force: list[str],
    dry_run: bool = False,
) -> State[Any]:
    try:
        chosen = None if preset == BASE else preset, None if ablation == UNCHANGED else ablation, overrides
        if SCREEN.get(None) is None:  # not from the command line
            settings, runtime = load_page_settings(*chosen)
        else:
            settings, runtime = load_settings(*chosen)
        wanted = select(settings, from_stage, until_stage, force)
        statuses = selected_statuses(
            plan(settings, runtime, deep=True), wanted, settings, force=force, given=as_options(*chosen)
        )
        _check_images(settings, wanted, cached_paths(statuses).get("dataset"))
    except EXPECTED_ERRORS as error:
        return Failed(message=str(error), data=error)
    for status in statuses:
        get_run_logger().info("%s is %s: %s", status.stage, status.state, status.reason)
    if dry_run:
        return Completed(message=_count(status.state for status in statuses))
    for line in advice(settings, runtime, chosen[0], [status.stage for status in statuses if status.state != "cached"]):
        get_run_logger().warning("%s", line)
    observers: list[Observer] = [LogRelay(get_run_logger), SCREEN.get(NullObserver())]
    with ExitStack() as stack:
        if runtime.tracking:
            tags = {"preset": preset, "ablation": ablation, "prefect.flow_run_id": str(flow_run.id)}
            observers.append(stack.enter_context(Tracker(settings, runtime, name=_run_name(), tags=tags)))
        stages = [STAGES[name] for name in wanted]
        return _run_stages(stages, settings, runtime, force=force, observer=CompositeObserver(observers))


def _run_stages(
    stages: list[Stage], settings: Settings, runtime: RuntimeConfig, *, force: list[str], observer: Observer
) -> State[Any]:
    """Run the stages one after the other; the first failure ends the run."""
    states: dict[str, State[Any]] = {}
    for number, stage in enumerate(stages):
        after = [each.name for each in stages[number + 1 :]]
        make = _stage_task(stage, settings, runtime, force=stage.name in force, observer=observer, after=after)
        read = inputs_read(stage, settings)
        inputs = [states[name] for name in read if name in states]  # edges of the graph on Prefect's page
        states[stage.name] = state = make(return_state=True, wait_for=inputs)
        if not state.is_completed():
            return Failed(message=state.message, data=state.result(raise_on_failure=False))
    return Completed(message=_count("cached" if state.name == "Cached" else "made" for state in states.values()))


def _stage_task(
    stage: Stage, settings: Settings, runtime: RuntimeConfig, *, force: bool, observer: Observer, after: list[str]
) -> Task[[], State[Any]]:
    """The task of a stage, which runs before the stages `after`.

    It has no parameters, since Prefect would inspect and display them. It runs in the main thread. A cancellation
    raises an exception there, which terminates the stage's process.
    """

    @task(
        name=stage.name,
        task_run_name=stage.name,
        description=stage.summary,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def make() -> State[Any]:
        try:
            result = run_stage(stage, settings, runtime, force=force, observer=observer)
            if stage.name == "dataset":
                _check_images(settings, after, result.path)
        except EXPECTED_ERRORS as error:
            return Failed(message=str(error), data=error)
        if result.state == "ran":
            return Completed(message=f"{result.key} made in {result.duration_s:.0f} s")
        return Completed(name="Cached", message=f"{result.key} reused")

    return make


def _check_images(settings: Settings, stages: list[str], dataset: Path | None) -> None:
    """Refuse to go on with too few images, and warn where images are repeated."""
    require_enough(settings, stages, dataset)
    if dataset is not None:
        for line in repeated_images(settings, stages, dataset):
            get_run_logger().warning("%s", line)


def _count(states: Iterable[str]) -> str:
    """Number of each state as text: `7 cached, 2 made`."""
    return ", ".join(f"{number} {state}" for state, number in Counter(states).items())
