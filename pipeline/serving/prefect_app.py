"""Prefect's server application behind the guard. uvicorn loads it; see `pipeline/servers/commands.py`."""

from __future__ import annotations

from prefect.server.api.server import create_app

from pipeline.servers.guard import Guard, guard

# Where Prefect's page keeps what was typed into its login.
_LOGIN_SCRIPT = 'localStorage.setItem("prefect-password", login);'


def app() -> Guard:
    """The application. Prefect itself asks for the login, also on its websockets."""
    return guard(create_app(final=True), asks=False, login_script=_LOGIN_SCRIPT)
