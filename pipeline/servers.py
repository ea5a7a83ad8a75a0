"""Prefect and MLflow servers on this machine: `up`, `down`, and a temporary Prefect server for a single run.

All files are under home/.servers: databases, logs, and state.json, which lists the processes that `dpar up` started.
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

from conf.environment import as_variables
from conf.runtime import RuntimeConfig
from pipeline.databases import sqlite_address
from pipeline.processes import HOST, Service, answers, fetch, free_port, listener, start, wait_until
from stages.runtime.artifact import read_json, write_json
from stages.runtime.errors import InputError

DEPLOYMENTS = ("dpar-pipeline/local", "dpar-stage/local")
_START_TIMEOUT_S = 180.0  # the first start reads from a cold disk and creates the database
_PREFECT_HEALTH, _MLFLOW_HEALTH = "/api/health", "/health"

# No usage statistics, no promotional content.
_QUIET = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@dataclass(frozen=True)
class Addresses:
    """URLs of the servers, for a browser."""

    prefect: str
    mlflow: str


@dataclass(frozen=True)
class PrefectServer:
    """A Prefect server that may still be starting. Call `wait` before use; meanwhile Prefect can be imported."""

    api_url: str
    wait: Callable[[], None]


def server_folder(runtime: RuntimeConfig) -> Path:
    """Folder of the servers' files."""
    return runtime.home.absolute() / ".servers"


def mlflow_uri(runtime: RuntimeConfig) -> str:
    """URI of the MLflow store."""
    return runtime.tracking_uri or sqlite_address(server_folder(runtime) / "mlflow.db")


def environment(runtime: RuntimeConfig) -> dict[str, str]:
    """Environment variables for Prefect and MLflow, to be set before either is imported. Existing variables win."""
    folder = server_folder(runtime) / "prefect"
    home = {"PREFECT_HOME": str(folder), "PREFECT_RUNNER_POLL_FREQUENCY": "2"}
    database = sqlite_address(folder / "prefect.db", "aiosqlite")
    # Prefect does not quote the path in its default.
    if "PREFECT_HOME" not in os.environ and not database.endswith(f"{folder}/prefect.db"):
        home["PREFECT_API_DATABASE_CONNECTION_URL"] = database
    return _QUIET | home | os.environ


def up(runtime: RuntimeConfig) -> Addresses:
    """Start Prefect, MLflow, and the process that executes runs requested on Prefect's page.

    If `tracking_uri` is the URL of an MLflow server, no MLflow server is started here.

    Raises:
        InputError: A port is in use.
        ServerError: A process did not start; the others are stopped again.
    """
    found = running(runtime)
    if found is not None:
        return found
    down(runtime)  # stop the others if one of them has died
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
    """Stop the processes that `up` started."""
    services, _ = _read_state(runtime)
    for service in reversed(services):
        service.end()
    _state_path(runtime).unlink(missing_ok=True)


def running(runtime: RuntimeConfig) -> Addresses | None:
    """URLs of the servers that `up` started; None unless all of them run."""
    services, addresses = _read_state(runtime)
    return addresses if all(service.alive for service in services) else None


@contextmanager
def prefect_server(runtime: RuntimeConfig) -> Iterator[PrefectServer]:
    """The Prefect server for a run: PREFECT_API_URL, else that of `up`, else a temporary one with the same database."""
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
    """Start a Prefect server on a free port, and stop it at the end of the block.

    Raises:
        ServerError: Raised by `wait` if the server does not start.
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
    """Start the processes. Each is yielded as soon as it exists, so that the caller can stop it after a failure."""
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
    # The page in the browser uses this URL; its default is port 4200.
    address = {"PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api"}
    log = server_folder(runtime) / "prefect.log"
    return start("Prefect", command, environment(runtime) | address, log, die_with_parent=die_with_parent)


def _start_mlflow(runtime: RuntimeConfig, port: int) -> Service:
    folder = server_folder(runtime)
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    # MLflow puts the root into SQL without quotes, so it is given as an address.
    pictures = (folder / "mlartifacts").as_uri()
    command += ["--backend-store-uri", mlflow_uri(runtime), "--default-artifact-root", pictures]
    # MLflow's job runner is not used here. Disabling it saves eight processes and a slow start.
    jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return start("MLflow", command, environment(runtime) | jobs, folder / "mlflow.log", die_with_parent=False)


def _start_runs(runtime: RuntimeConfig, prefect_port: int) -> Service:
    command = [sys.executable, "-c", "from pipeline.serving.flows import serve; serve()"]
    variables = {"PREFECT_API_URL": f"http://{HOST}:{prefect_port}/api"} | as_variables(runtime)
    log = server_folder(runtime) / "runs.log"
    return start("runs", command, environment(runtime) | variables, log, die_with_parent=False)


def _polled_since(prefect_port: int, deployment: str, since: float) -> bool:
    """Whether the process that serves a deployment has polled since a time (epoch seconds)."""
    body = fetch(prefect_port, f"/api/deployments/name/{deployment}")
    polled = json.loads(body)["last_polled"] if body is not None else None
    return polled is not None and datetime.fromisoformat(polled).timestamp() >= since


def _check_free(name: str, port: int) -> None:
    owner = listener(port)
    if owner is not None:
        raise InputError(
            f"port {port} for {name} is in use by {owner}: stop that process, "
            f"or choose another port with --set runtime.{name}_port={port + 100} or DPAR_{name.upper()}_PORT"
        )


def _tracks_elsewhere(runtime: RuntimeConfig) -> bool:
    return mlflow_uri(runtime).startswith(("http://", "https://"))


def _addresses(runtime: RuntimeConfig) -> Addresses:
    mlflow = mlflow_uri(runtime) if _tracks_elsewhere(runtime) else f"http://{HOST}:{runtime.mlflow_port}"
    return Addresses(f"http://{HOST}:{runtime.prefect_port}", mlflow)


def _state_path(runtime: RuntimeConfig) -> Path:
    return server_folder(runtime) / "state.json"


def _write_state(runtime: RuntimeConfig, services: Sequence[Service], addresses: Addresses | None) -> None:
    """Write state.json. Without addresses, the servers are not up yet, but `down` can stop them."""
    known = asdict(addresses) if addresses is not None else None
    write_json(_state_path(runtime), {"services": [asdict(service) for service in services], "addresses": known})


def _read_state(runtime: RuntimeConfig) -> tuple[list[Service], Addresses | None]:
    path = _state_path(runtime)
    if not path.exists():
        return [], None
    state = read_json(path)
    addresses = Addresses(**state["addresses"]) if state["addresses"] is not None else None
    return [Service(**fields) for fields in state["services"]], addresses
