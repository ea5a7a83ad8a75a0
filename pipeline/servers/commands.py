"""Command line and environment of each process of `dpar up`.

No login is in a command line, where all users of the machine could read it. Prefect and MLflow run under uvicorn with
their own application behind a guard (`guard.py`).
"""

from __future__ import annotations

import os
from pathlib import Path

from conf.environment import SERVERS, STARTED_IN, as_variables
from conf.runtime import RuntimeConfig
from pipeline.processes import CODE_ROOT, HOST, Service, exempt_loopback, own_python, python_path, start
from pipeline.servers.databases import sqlite_address
from pipeline.servers.guard import AUTH_VARIABLE, LOCK_VARIABLE
from pipeline.servers.state import empty_folder, private_folder, server_folder

PREFECT_APP, MLFLOW_APP = "pipeline.serving.prefect_app:app", "pipeline.tracking.mlflow_app:app"
RUNS = "from pipeline.serving.flows import serve; serve()"
_PRIVATE_UMASK = 0o077
_GRACE_S = 5  # for open connections of a browser

# No usage statistics, no promotional content.
_QUIET = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def mlflow_uri(runtime: RuntimeConfig) -> str:
    """URI of the MLflow store."""
    return runtime.tracking_uri or sqlite_address(server_folder(runtime) / "mlflow.db")


def tracks_elsewhere(runtime: RuntimeConfig) -> bool:
    """Whether the MLflow store is a server that is not of `dpar up`."""
    return mlflow_uri(runtime).startswith(("http://", "https://"))


def environment(runtime: RuntimeConfig) -> dict[str, str]:
    """Environment variables for Prefect and MLflow, to be set before either is imported.

    Existing variables win, except that no proxy may catch the traffic of this machine, and that no process imports code
    from its current folder.
    """
    folder = server_folder(runtime) / "prefect"
    home = {"PREFECT_HOME": str(folder), "PREFECT_RUNNER_POLL_FREQUENCY": "2"}
    database = sqlite_address(folder / "prefect.db", "aiosqlite")
    # Prefect does not quote the path in its default.
    if "PREFECT_HOME" not in os.environ and not database.endswith(f"{folder}/prefect.db"):
        home["PREFECT_API_DATABASE_CONNECTION_URL"] = database
    found = _QUIET | home | os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": python_path(CODE_ROOT)}
    if "PREFECT_LOGGING_SETTINGS_PATH" not in found:
        # A logging configuration can call anything, and `.env` or `prefect.toml` in the current folder can name one.
        found.setdefault("PREFECT_LOGGING_CONFIG_PATH", f"{found['PREFECT_HOME']}/logging.yml")
    exempt_loopback(found)
    return found


def start_prefect(runtime: RuntimeConfig, port: int, auth: str, *, die_with_parent: bool) -> Service:
    """Start a Prefect server."""
    address, shared = f"http://{HOST}:{port}", environment(runtime)
    folder = empty_folder(runtime)
    home = Path(shared["PREFECT_HOME"]).absolute()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": address,
        "PREFECT_SERVER_UI_API_URL": "/api",  # the page asks its own server, also through a tunnel of another port
        AUTH_VARIABLE: auth,
        LOCK_VARIABLE: str(home / "start.lock"),
    }
    return _serve(runtime, "Prefect", PREFECT_APP, port, shared | own, folder=folder, die_with_parent=die_with_parent)


def start_mlflow(runtime: RuntimeConfig, port: int, auth: str) -> Service:
    """Start an MLflow server."""
    folder = private_folder(runtime)
    own = {
        "MLFLOW_BACKEND_STORE_URI": mlflow_uri(runtime),
        # MLflow puts the root into SQL without quotes, so it is given as an address.
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": (folder / "mlartifacts").as_uri(),
        # MLflow's job runner is not used here. Disabling it saves eight processes and a slow start.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        AUTH_VARIABLE: auth,
        LOCK_VARIABLE: str(store_lock(folder)),
    }
    return _serve(runtime, "MLflow", MLFLOW_APP, port, environment(runtime) | own, folder=None, die_with_parent=False)


def start_runs(runtime: RuntimeConfig, prefect: dict[str, str]) -> Service:
    """Start the process that executes runs requested on Prefect's page.

    Args:
        runtime: Runtime settings.
        prefect: Variables of a client of the Prefect server.
    """
    own = prefect | as_variables(runtime) | {STARTED_IN: os.getcwd()}
    log = private_folder(runtime) / "runs.log"
    variables = _marked(runtime, environment(runtime) | own)
    return start("runs", own_python("-c", RUNS), variables, log, die_with_parent=False, folder=empty_folder(runtime))


def store_lock(folder: Path) -> Path:
    """File that is locked while the MLflow store in home/.servers is opened: the first one to open it creates it."""
    return folder / ".mlflow.db.lock"


def _serve(
    runtime: RuntimeConfig,
    name: str,
    app: str,
    port: int,
    variables: dict[str, str],
    *,
    folder: Path | None,
    die_with_parent: bool,
) -> Service:
    command = own_python("-m", "uvicorn", "--factory", app, "--app-dir", str(CODE_ROOT), "--host", HOST)
    command += ["--port", str(port), "--workers", "1", "--no-proxy-headers", "--log-level", "warning"]
    command += ["--timeout-graceful-shutdown", str(_GRACE_S)]
    log = private_folder(runtime) / f"{name.lower()}.log"
    variables = {key: value for key, value in variables.items() if not key.startswith("UVICORN_")}
    if not die_with_parent:
        variables = _marked(runtime, variables)
    return start(
        name,
        command,
        variables,
        log,
        die_with_parent=die_with_parent,
        folder=folder,
        umask=_PRIVATE_UMASK,
    )


def _marked(runtime: RuntimeConfig, variables: dict[str, str]) -> dict[str, str]:
    return variables | {SERVERS: str(server_folder(runtime))}
