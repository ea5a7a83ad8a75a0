"""MLflow's server application behind the guard. uvicorn loads it; see `pipeline/servers/commands.py`.

MLflow's own login needs a package that is not installed here. Without a login, whoever reaches the port could read and
write any file of its owner, through runs whose artifacts are in a folder of its choice.
"""

from __future__ import annotations

import os
from pathlib import Path

from mlflow.server import constants

from pipeline.servers.guard import LOCK_VARIABLE, Guard, guard, locked

# A request with a login makes the browser remember it for this origin.
_LOGIN_SCRIPT = """const [user, password] = atob(login).split(":");
const request = new XMLHttpRequest();
request.open("GET", "/version", false, user, password);
request.send();"""


def app() -> Guard:
    """The application over the store that the environment names. It is no proxy for artifacts."""
    store, root = os.environ["MLFLOW_BACKEND_STORE_URI"], os.environ["MLFLOW_DEFAULT_ARTIFACT_ROOT"]
    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = store  # MLflow's command line sets these for its workers
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = root
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    with locked(Path(os.environ[LOCK_VARIABLE])):
        initialize_backend_stores(store, store, root)
    return guard(app, asks=True, login_script=_LOGIN_SCRIPT)
