"""Prefect and MLflow on this machine: up, down, or a Prefect server for the length of one run.

Everything lies under home/.servers: databases, logs, and state.json, which says what `dpar up` has started.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from conf.schema import RuntimeConfig
from pipeline.processes import HOST, Service, answers, fetch, free_port, listener, start, wait_until
from stages.runtime.artifact import read_json, write_json
from stages.runtime.errors import InputError

DEPLOYMENTS = ("dpar-pipeline/local", "dpar-stage/local")
_START_TIMEOUT_S = 180.0  # a first start imports from a cold disk and makes its database
_PREFECT_HEALTH, _MLFLOW_HEALTH = "/api/health", "/health"

# For people who did not ask to be counted, and for pages that show their own runs only.
_QUIET = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@dataclass(frozen=True)
class Addresses:
    """Where a browser finds the servers."""

    prefect: str
    mlflow: str


@dataclass(frozen=True)
class PrefectServer:
    """A Prefect server that may still be starting: importing Prefect takes as long, so both are done at once."""

    api_url: str
    wait: Callable[[], None]


def server_folder(runtime: RuntimeConfig) -> Path:
    """Where the servers keep their things."""
    return runtime.home.absolute() / ".servers"


def mlflow_uri(runtime: RuntimeConfig) -> str:
    """The MLflow store of these settings."""
    return runtime.tracking_uri or f"sqlite:///{server_folder(runtime) / 'mlflow.db'}"


def environment(runtime: RuntimeConfig) -> dict[str, str]:
    """Variables for Prefect and MLflow, to be set before either is imported. Those a person has set already win."""
    home = {"PREFECT_HOME": str(server_folder(runtime) / "prefect"), "PREFECT_RUNNER_POLL_FREQUENCY": "2"}
    return _QUIET | home | os.environ


def up(runtime: RuntimeConfig) -> Addresses:
    """Start Prefect, MLflow, and the process that runs what is asked for on Prefect's page.

    An MLflow server that `tracking_uri` names is not started, it runs elsewhere.

    Raises:
        InputError: A port is taken.
        ServerError: One of them did not start; the others are ended again.
    """
    found = running(runtime)
    if found is not None:
        return found
    down(runtime)  # what is left when one of them has died
    addresses = _addresses(runtime)
    _check_free("prefect", runtime.prefect_port)
    if not _tracks_elsewhere(runtime):
        _check_free("mlflow", runtime.mlflow_port)
    started: list[Service] = []
    try:
        for service in _start_all(runtime):
            started.append(service)
            _write_state(runtime, started, None)
    except BaseException:
        down(runtime)
        raise
    _write_state(runtime, started, addresses)
    return addresses


def down(runtime: RuntimeConfig) -> None:
    """End what `up` has started, if it still runs."""
    services, _ = _read_state(runtime)
    for service in reversed(services):
        service.end()
    _state_path(runtime).unlink(missing_ok=True)


def running(runtime: RuntimeConfig) -> Addresses | None:
    """Where the servers that `up` has started are; None unless all of them run."""
    services, addresses = _read_state(runtime)
    return addresses if all(service.alive for service in services) else None


@contextmanager
def prefect_server(runtime: RuntimeConfig) -> Iterator[PrefectServer]:
    """The Prefect server for a run: PREFECT_API_URL's, else that of `up`, else a temporary one on the same data."""
    found = running(runtime)
    if "PREFECT_API_URL" in os.environ:
        yield PrefectServer(os.environ["PREFECT_API_URL"], wait=lambda: None)
    elif found is not None:
        yield PrefectServer(f"{found.prefect}/api", wait=lambda: None)
    else:
        with temporary_prefect_server(runtime) as server:
            yield server


@contextmanager
def temporary_prefect_server(runtime: RuntimeConfig) -> Iterator[PrefectServer]:
    """Start a Prefect server on a free port, and end it when the body ends.

    Raises:
        ServerError: From `wait`, when it does not start.
    """
    port = free_port()
    service = _start_prefect(runtime, port, die_with_parent=True)
    try:
        yield PrefectServer(
            f"http://{HOST}:{port}/api",
            wait=lambda: wait_until(service, lambda: answers(port, _PREFECT_HEALTH), _START_TIMEOUT_S),
        )
    finally:
        service.end()


def _start_all(runtime: RuntimeConfig) -> Iterator[Service]:
    """Yield each process as soon as it exists, so that it can be ended whatever comes next."""
    prefect_port, mlflow_port = runtime.prefect_port, runtime.mlflow_port
    prefect = _start_prefect(runtime, prefect_port, die_with_parent=False)
    yield prefect
    mlflow = None if _tracks_elsewhere(runtime) else _start_mlflow(runtime, mlflow_port)
    if mlflow is not None:
        yield mlflow
    wait_until(prefect, lambda: answers(prefect_port, _PREFECT_HEALTH), _START_TIMEOUT_S)
    since = time.time()
    runs = _start_runs(runtime, prefect_port)
    yield runs
    if mlflow is not None:
        wait_until(mlflow, lambda: answers(mlflow_port, _MLFLOW_HEALTH), _START_TIMEOUT_S)
    wait_until(runs, lambda: all(_polled_since(prefect_port, name, since) for name in DEPLOYMENTS), _START_TIMEOUT_S)


def _start_prefect(runtime: RuntimeConfig, port: int, *, die_with_parent: bool) -> Service:
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    # The page asks this address from the browser; without it, it would ask port 4200 whatever the port is.
    address = {"PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api"}
    log = server_folder(runtime) / "prefect.log"
    return start("Prefect", command, environment(runtime) | address, log, die_with_parent=die_with_parent)


def _start_mlflow(runtime: RuntimeConfig, port: int) -> Service:
    folder = server_folder(runtime)
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", mlflow_uri(runtime), "--default-artifact-root", str(folder / "mlartifacts")]
    # Its job runner is for a part of MLflow that is not used here: eight processes and a slow start less.
    jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return start("MLflow", command, environment(runtime) | jobs, folder / "mlflow.log", die_with_parent=False)


def _start_runs(runtime: RuntimeConfig, prefect_port: int) -> Service:
    command = [sys.executable, "-c", "from pipeline.serving.flows import serve; serve()"]
    variables = {"PREFECT_API_URL": f"http://{HOST}:{prefect_port}/api"} | _as_variables(runtime)
    log = server_folder(runtime) / "runs.log"
    return start("runs", command, environment(runtime) | variables, log, die_with_parent=False)


def _as_variables(runtime: RuntimeConfig) -> dict[str, str]:
    """Runtime settings as `DPAR_*`, for runs started from Prefect's page."""
    values = runtime.model_dump(mode="json", exclude_none=True) | {"home": str(runtime.home.absolute())}
    return {f"DPAR_{name.upper()}": str(value) for name, value in values.items()}


def _polled_since(prefect_port: int, deployment: str, since: float) -> bool:
    """Whether the process that runs a deployment has asked for work since a time, in seconds since the epoch."""
    body = fetch(prefect_port, f"/api/deployments/name/{deployment}")
    polled = json.loads(body)["last_polled"] if body is not None else None
    return polled is not None and datetime.fromisoformat(polled).timestamp() >= since


def _check_free(name: str, port: int) -> None:
    owner = listener(port)
    if owner is not None:
        raise InputError(
            f"port {port}, wanted for {name}, is taken by {owner}: stop that, "
            f"or choose another with --set runtime.{name}_port={port + 100} or DPAR_{name.upper()}_PORT"
        )


def _tracks_elsewhere(runtime: RuntimeConfig) -> bool:
    return mlflow_uri(runtime).startswith(("http://", "https://"))


def _addresses(runtime: RuntimeConfig) -> Addresses:
    mlflow = mlflow_uri(runtime) if _tracks_elsewhere(runtime) else f"http://{HOST}:{runtime.mlflow_port}"
    return Addresses(f"http://{HOST}:{runtime.prefect_port}", mlflow)


def _state_path(runtime: RuntimeConfig) -> Path:
    return server_folder(runtime) / "state.json"


def _write_state(runtime: RuntimeConfig, services: Sequence[Service], addresses: Addresses | None) -> None:
    """Addresses are written last: without them the servers are not up, only to be ended."""
    known = asdict(addresses) if addresses is not None else None
    write_json(_state_path(runtime), {"services": [asdict(service) for service in services], "addresses": known})


def _read_state(runtime: RuntimeConfig) -> tuple[list[Service], Addresses | None]:
    path = _state_path(runtime)
    if not path.exists():
        return [], None
    state = read_json(path)
    addresses = Addresses(**state["addresses"]) if state["addresses"] is not None else None
    return [Service(**fields) for fields in state["services"]], addresses
