"""The pipeline as Prefect flows, for runs that are started on Prefect's page.

A flow runs the same loop over the stages as the command line, and reports each stage as a task run in the same way: the
artifact cache alone decides what is cached, and a server that is down ends no stage. This module has no
`from __future__ import annotations`, since Prefect builds its forms from real annotations.
"""

import logging
import threading
from dataclasses import replace
from typing import Annotated, Any

import prefect
from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.deployments.runner import RunnerDeployment
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed
from prefect.types.entrypoint import EntrypointType
from pydantic import Field

from conf.load import SettingsError, load_settings, names
from pipeline.graph import STAGES
from pipeline.launch import StageFailed
from pipeline.runner import tally
from pipeline.servers import PrefectServer
from pipeline.serving.page import load_page_settings
from pipeline.serving.prefect_view import FLOW
from pipeline.serving.record import FlowRun, prefect_view, run_recorded
from pipeline.serving.whole_run import Request, plan_run
from pipeline.tracking.sender import send_left_behind
from pipeline.tracking.view import first_line
from stages.runtime.errors import ArtifactError, InputError

logger = logging.getLogger(__name__)
# Prefect's form shows these as drop-down lists, and its server rejects other values. The form has no list for
# `str | None`, so None has a name: BASE and UNCHANGED.
BASE, UNCHANGED = "base", "none"
FIRST, *_, LAST = STAGES
Preset = Annotated[str, Field(json_schema_extra={"enum": list[Any]([BASE, *names("preset")])})]
Ablation = Annotated[str, Field(json_schema_extra={"enum": list[Any]([UNCHANGED, *names("ablation")])})]
StageName = Annotated[str, Field(json_schema_extra={"enum": list[Any](STAGES)})]

# Errors whose message is enough; they are reported without a traceback.
EXPECTED_ERRORS = (SettingsError, InputError, ArtifactError, StageFailed)
_CATCH_UP_S = 10.0


def _run_name() -> str:
    """Name of a run in lists: its stage, preset, ablation and overrides."""
    given = flow_run.parameters
    request = _request(given["preset"], given["ablation"], given["overrides"])
    return " ".join(word for word in (given.get("stage"), request.name) if word)


@flow(name=FLOW, flow_run_name=_run_name, persist_result=False)
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


def serve() -> None:
    """Execute runs requested on Prefect's page, one at a time, until this process is terminated."""
    threading.Thread(target=_catch_up, name="catch-up", daemon=True).start()
    deployments = [
        RunnerDeployment.from_flow(each, name="local", entrypoint_type=EntrypointType.MODULE_PATH)
        for each in (pipeline_flow, stage_flow)
    ]
    prefect.serve(*deployments, limit=1, print_starting_message=False)


def _catch_up() -> None:
    """Send what Prefect has missed, again and again: runs of killed processes, and runs while it was down."""
    _, runtime = load_settings()
    server = prefect_view(runtime, _server(), own=True)
    pause = threading.Event()
    while True:
        try:
            send_left_behind(server, server.connect())
        except Exception as error:
            logger.warning("Prefect (%s) does not answer: %s", server.address, first_line(error))
        pause.wait(_CATCH_UP_S)


def _server() -> PrefectServer:
    """The server that has started this process."""
    return PrefectServer(str(PREFECT_API_URL.value()), wait=lambda: None)


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
    chosen = _request(preset, ablation, overrides)
    try:
        run = plan_run(
            replace(chosen, from_stage=from_stage, until_stage=until_stage, force=tuple(force)), load_page_settings
        )
        if dry_run:
            for status in run.statuses:
                get_run_logger().info("%s is %s: %s", status.stage, status.state, status.reason)
            return Completed(message=tally(status.state for status in run.statuses))
        flow = FlowRun(str(flow_run.id), _run_name())
        results = run_recorded(run, prefect_view(run.runtime, _server(), own=True), flow=flow)
    except EXPECTED_ERRORS as error:
        return Failed(message=str(error), data=error)
    return Completed(message=tally(result.outcome for result in results))


def _request(preset: str, ablation: str, overrides: list[str]) -> Request:
    """The settings that a form asks for."""
    chosen = None if preset == BASE else preset, None if ablation == UNCHANGED else ablation
    return Request(*chosen, overrides=tuple(overrides))
