"""The graph as a Prefect flow; the only file that knows Prefect. Annotations stay real: forms are built from them.

A stage is a task that calls `run_stage`, the one way to run a stage. Prefect's own cache and result store are off, so
there is one truth about what is cached; a task whose artifact is there ends in the state `Cached`.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
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
from conf.schema import RuntimeConfig, Settings
from pipeline.graph import STAGES, Stage, inputs_read
from pipeline.launch import StageFailed
from pipeline.plan import plan
from pipeline.runner import NullObserver, Observer, run_stage
from pipeline.selection import as_options, asked_for, select
from pipeline.serving.relay import LogRelay, Together
from pipeline.tracking.tracker import Tracker
from stages.runtime.errors import ArtifactError, InputError

# Names become drop-down lists in the form of a deployment, and the server refuses others. The form shows a list only
# for plain text, not for text or nothing: so "nothing" has a name.
BASE, UNCHANGED = "base", "none"
FIRST, *_, LAST = STAGES
Preset = Annotated[str, Field(json_schema_extra={"enum": list[Any]([BASE, *names("preset")])})]
Ablation = Annotated[str, Field(json_schema_extra={"enum": list[Any]([UNCHANGED, *names("ablation")])})]
StageName = Annotated[str, Field(json_schema_extra={"enum": list[Any](STAGES)})]

TOLD = (SettingsError, InputError, ArtifactError, StageFailed)  # their message says it all: no traceback
SCREEN: ContextVar[Observer] = ContextVar("SCREEN")  # of the command line that runs the flow in its own process


def _run_name() -> str:
    """For lists of runs: what was asked for, in the words it was asked in."""
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
    """Make what is not made yet, in the order of the graph.

    Args:
        preset: Settings to start from; base is the paper's.
        ablation: Change to the preset.
        overrides: Single settings, each as stage.field=value.
        from_stage: Start here; what it reads must be cached.
        until_stage: Stop after this stage.
        force: Stages to make again though they are cached.
        dry_run: Only say what would be made, and why.
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
    """Make one stage.

    Args:
        stage: What it reads must be cached.
        preset: Settings to start from; base is the paper's.
        ablation: Change to the preset.
        overrides: Single settings, each as stage.field=value.
        force: Make it again though it is cached.
    """
    forced = [stage] if force else []
    return _run(preset, ablation, overrides, from_stage=stage, until_stage=stage, force=forced)


def run_here(parameters: Mapping[str, Any], screen: Observer) -> None:
    """Run the pipeline flow in this process.

    Args:
        parameters: Of `pipeline_flow`; those that are None take its defaults.
        screen: Is told what happens.

    Raises:
        SettingsError: A setting cannot be used.
        InputError: A stage is asked for that cannot run, or a file that the settings name is missing.
        StageFailed: A stage's process did not end well.
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
    """Prefect sends logs from a thread, which would find the server gone when this process ends."""
    for handler in logging.getLogger("prefect.flow_runs").handlers:
        handler.flush()


def serve() -> None:
    """Run what is asked for on Prefect's page, one run at a time, until this process is ended."""
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
        settings, runtime = load_settings(*chosen)
        wanted = select(settings, from_stage, until_stage, force)
        statuses = asked_for(
            plan(settings, runtime, deep=True), wanted, settings, force=force, given=as_options(*chosen)
        )
    except TOLD as error:
        return Failed(message=str(error), data=error)
    for status in statuses:
        get_run_logger().info("%s is %s: %s", status.stage, status.state, status.reason)
    if dry_run:
        return Completed(message=_count(status.state for status in statuses))
    observers: list[Observer] = [LogRelay(get_run_logger), SCREEN.get(NullObserver())]
    with ExitStack() as stack:
        if runtime.tracking:
            tags = {"preset": preset, "ablation": ablation, "prefect.flow_run_id": str(flow_run.id)}
            observers.append(stack.enter_context(Tracker(settings, runtime, name=_run_name(), tags=tags)))
        stages = [STAGES[name] for name in wanted]
        return _run_stages(stages, settings, runtime, force=force, observer=Together(observers))


def _run_stages(
    stages: list[Stage], settings: Settings, runtime: RuntimeConfig, *, force: list[str], observer: Observer
) -> State[Any]:
    """Make the stages one after the other; the first that fails ends the run."""
    states: dict[str, State[Any]] = {}
    for stage in stages:
        make = _stage_task(stage, settings, runtime, force=stage.name in force, observer=observer)
        read = inputs_read(stage, settings)
        inputs = [states[name] for name in read if name in states]  # the arrows of the drawn graph
        states[stage.name] = state = make(return_state=True, wait_for=inputs)
        if not state.is_completed():
            return Failed(message=state.message, data=state.result(raise_on_failure=False))
    return Completed(message=_count("cached" if state.name == "Cached" else "made" for state in states.values()))


def _stage_task(
    stage: Stage, settings: Settings, runtime: RuntimeConfig, *, force: bool, observer: Observer
) -> Task[[], State[Any]]:
    """A task without parameters, for Prefect would look through them and show them.

    It runs in the main thread, where a cancellation reaches it as an exception that ends the stage's process.
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
        except TOLD as error:
            return Failed(message=str(error), data=error)
        if result.state == "ran":
            return Completed(message=f"{result.key} made in {result.duration_s:.0f} s")
        return Completed(name="Cached", message=f"{result.key} reused")

    return make


def _count(states: Iterable[str]) -> str:
    """`7 cached, 2 made`."""
    return ", ".join(f"{number} {state}" for state, number in Counter(states).items())
