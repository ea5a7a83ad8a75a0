"""Prefect and MLflow servers on this machine, which answer nobody but the user who started them.

Read `lifecycle.py` first; `commands.py` says how each process starts, `guard.py` which requests it refuses, `state.py`
where its files are.
"""

from pipeline.processes import ServerError, exempt_loopback
from pipeline.servers.commands import environment, mlflow_uri, start_mlflow, store_lock
from pipeline.servers.guard import locked
from pipeline.servers.lifecycle import (
    DEPLOYMENTS,
    PrefectServer,
    down,
    prefect_server,
    running,
    temporary_prefect_server,
    up,
)
from pipeline.servers.login import open_pages
from pipeline.servers.state import Addresses, empty_folder, read_auth, server_folder

__all__ = [
    "DEPLOYMENTS",
    "Addresses",
    "PrefectServer",
    "ServerError",
    "down",
    "empty_folder",
    "environment",
    "exempt_loopback",
    "locked",
    "mlflow_uri",
    "open_pages",
    "prefect_server",
    "read_auth",
    "running",
    "server_folder",
    "start_mlflow",
    "store_lock",
    "temporary_prefect_server",
    "up",
]
