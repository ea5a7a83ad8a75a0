"""Runs the stages of a run and records it for Prefect and MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from conf.runtime import RuntimeConfig
from pipeline.runner import Observer, StageResult
from pipeline.servers import PrefectServer, server_folder
from pipeline.serving.composite_observer import CompositeObserver
from pipeline.serving.prefect_view import PrefectView
from pipeline.serving.whole_run import WholeRun, run_stages
from pipeline.tracking.tracker import RunStart, mlflow_server, recorded
from pipeline.tracking.view import Server, View, require_usable


class FlowRun(NamedTuple):
    """A flow run that Prefect has started."""

    identity: str
    name: str


def run_recorded(
    run: WholeRun, prefect: Server | None, observers: Sequence[Observer] = (), *, flow: FlowRun | None = None
) -> list[StageResult]:
    """Run the selected stages. What Prefect and MLflow do has no influence on it.

    Args:
        run: The run.
        prefect: The Prefect server; None if there is none.
        observers: More observers of the run.
        flow: The flow run if Prefect has started this run.

    Raises:
        InputError: A stage cannot run, or a file named in the settings is missing.
        ArtifactError: An input is damaged.
        StageFailed: A stage's process failed.
    """
    tags = {"preset": run.request.preset or "base", "ablation": run.request.ablation or "none"}
    if flow is not None:
        tags["prefect.flow_run_id"] = flow.identity
    start = RunStart(
        name=flow.name if flow is not None else run.request.name,
        tags=tags,
        settings=run.settings.model_dump(mode="json"),
        parameters=run.request.parameters(),
        inputs=run.inputs,
        notes=run.notes(),
        flow_run_id=flow.identity if flow is not None else None,
    )
    mlflow = [mlflow_server(run.runtime)] if run.runtime.tracking else []
    with recorded(start, [*([prefect] if prefect is not None else []), *mlflow]) as trackers:
        return run_stages(run, CompositeObserver([*trackers, *observers]))


def prefect_view(runtime: RuntimeConfig, server: PrefectServer, *, own: bool) -> Server:
    """A Prefect server as a view of runs.

    Args:
        runtime: Runtime settings.
        server: The server, which may still be starting.
        own: Whether its database is the one in our home.
    """
    folder = server_folder(runtime)
    store = "home" if own else server.api_url  # a server of ours has another port each time

    def connect() -> View:
        if own:
            require_usable(folder / "prefect" / "prefect.db")
        server.wait()
        return PrefectView(server.api_url, store, server.auth)

    return Server(
        name="Prefect",
        address=server.api_url,
        journals=folder / "flow-runs",
        later="`dpar up` or the next run",
        prepare=lambda: None,
        connect=connect,
        starts=own,
    )
