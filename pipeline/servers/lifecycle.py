"""Start and stop the servers: `up`, `down`, and a temporary Prefect server for a single run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from conf.environment import SERVERS
from conf.runtime import RuntimeConfig
from pipeline.processes import HOST, Service, answers, fetch, free_port, listener, marked, wait_until
from pipeline.servers.commands import (
    MLFLOW_APP,
    PREFECT_APP,
    RUNS,
    mlflow_uri,
    start_mlflow,
    start_prefect,
    start_runs,
    tracks_elsewhere,
)
from pipeline.servers.guard import HEALTH, basic, locked
from pipeline.servers.login import remove_login_pages
from pipeline.servers.state import (
    Addresses,
    new_auth,
    private_folder,
    read_auth,
    read_state,
    remove_state,
    server_folder,
    write_auth,
    write_state,
)
from stages.runtime.errors import InputError

DEPLOYMENTS = ("dpar-pipeline/local", "dpar-stage/local")
_START_TIMEOUT_S = 180.0  # the first start reads from a cold disk and creates the database
_PREFECT_HEALTH = "/api/health"


@dataclass(frozen=True)
class PrefectServer:
    """A Prefect server that may still be starting. Call `wait` before use; meanwhile Prefect can be imported.

    Attributes:
        api_url: URL of its API.
        wait: Waits until it answers.
        auth: Its login `user:password`, if this is a server of ours.
    """

    api_url: str
    wait: Callable[[], None]
    auth: str | None = None

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of its clients."""
        own = {} if self.auth is None else {"PREFECT_API_AUTH_STRING": self.auth}
        return {"PREFECT_API_URL": self.api_url} | own


def up(runtime: RuntimeConfig) -> Addresses:
    """Start Prefect, MLflow, and the process that executes runs requested on Prefect's page.

    If `tracking_uri` is the URL of an MLflow server, no MLflow server is started here. Each start makes a new login.

    Raises:
        InputError: A port is in use.
        ServerError: A process did not start; the others are stopped again.
    """
    with locked(private_folder(runtime) / "up.lock"):  # a second `up` waits, and finds what the first has started
        found = running(runtime)
        if found is not None:
            return found
        _stop(runtime)  # stop the others if one of them has died
        addresses, auth = _addresses(runtime), new_auth()
        _check_free("prefect", runtime.prefect_port)
        if not tracks_elsewhere(runtime):
            _check_free("mlflow", runtime.mlflow_port)
        started: list[Service] = []
        try:
            for service in _start_all(runtime, auth):
                started.append(service)
                write_state(runtime, started, None)
        except BaseException:
            _stop(runtime)
            raise
        write_auth(runtime, auth)
        write_state(runtime, started, addresses)
        return addresses


def down(runtime: RuntimeConfig) -> None:
    """Stop the processes that `up` started, whatever state.json says: each bears the mark of its home."""
    _stop(runtime)


def running(runtime: RuntimeConfig) -> Addresses | None:
    """URLs of the servers that `up` started; None unless all of them run."""
    state = read_state(runtime)
    complete = read_auth(runtime) is not None and all(service.alive for service in state.services)
    return state.addresses if complete else None


@contextmanager
def prefect_server(runtime: RuntimeConfig) -> Iterator[PrefectServer]:
    """The Prefect server for a run: PREFECT_API_URL, else that of `up`, else a temporary one with the same database."""
    found, auth, given = running(runtime), read_auth(runtime), os.environ.get("PREFECT_API_URL")
    if given is not None and (found is None or given.rstrip("/") != f"{found.prefect}/api"):
        yield PrefectServer(given, wait=lambda: None)
    elif found is not None and auth is not None:
        yield PrefectServer(f"{found.prefect}/api", wait=lambda: None, auth=auth)
    else:
        with temporary_prefect_server(runtime) as server:
            yield server


@contextmanager
def temporary_prefect_server(runtime: RuntimeConfig) -> Iterator[PrefectServer]:
    """Start a Prefect server on a free port, and stop it at the end of the block. Its login is only in memory.

    Raises:
        ServerError: Raised by `wait` if the server does not start.
    """
    port, auth = free_port(), new_auth()
    service = start_prefect(runtime, port, auth, die_with_parent=True)
    try:
        yield PrefectServer(
            f"http://{HOST}:{port}/api",
            wait=lambda: wait_until(service, lambda: answers(port, _PREFECT_HEALTH), _START_TIMEOUT_S),
            auth=auth,
        )
    finally:
        service.end()


def _start_all(runtime: RuntimeConfig, auth: str) -> Iterator[Service]:
    """Start the processes. Each is yielded as soon as it exists, so that the caller can stop it after a failure."""
    prefect_port, mlflow_port = runtime.prefect_port, runtime.mlflow_port
    prefect = start_prefect(runtime, prefect_port, auth, die_with_parent=False)
    yield prefect
    mlflow = None if tracks_elsewhere(runtime) else start_mlflow(runtime, mlflow_port, auth)
    if mlflow is not None:
        yield mlflow
    wait_until(prefect, lambda: answers(prefect_port, _PREFECT_HEALTH), _START_TIMEOUT_S)
    since = time.time()
    runs = start_runs(runtime, PrefectServer(f"http://{HOST}:{prefect_port}/api", lambda: None, auth).variables)
    yield runs
    if mlflow is not None:
        wait_until(mlflow, lambda: answers(mlflow_port, HEALTH), _START_TIMEOUT_S)
    wait_until(
        runs, lambda: all(_polled_since(prefect_port, name, since, auth) for name in DEPLOYMENTS), _START_TIMEOUT_S
    )


def _stop(runtime: RuntimeConfig) -> None:
    for service in reversed(read_state(runtime).services):
        service.end()
    for service in marked(SERVERS, str(server_folder(runtime)), (PREFECT_APP, MLFLOW_APP, RUNS)):
        service.end()
    remove_state(runtime)
    remove_login_pages(runtime)


def _polled_since(prefect_port: int, deployment: str, since: float, auth: str) -> bool:
    """Whether the process that serves a deployment has polled since a time (epoch seconds)."""
    body = fetch(prefect_port, f"/api/deployments/name/{deployment}", basic(auth))
    polled = json.loads(body)["last_polled"] if body is not None else None
    return polled is not None and datetime.fromisoformat(polled).timestamp() >= since


def _check_free(name: str, port: int) -> None:
    owner = listener(port)
    if owner is not None:
        raise InputError(
            f"port {port} for {name} is in use by {owner}: stop that process, "
            f"or choose another port with --set runtime.{name}_port={port + 100} or DPAR_{name.upper()}_PORT"
        )


def _addresses(runtime: RuntimeConfig) -> Addresses:
    mlflow = mlflow_uri(runtime) if tracks_elsewhere(runtime) else f"http://{HOST}:{runtime.mlflow_port}"
    return Addresses(f"http://{HOST}:{runtime.prefect_port}", mlflow)
