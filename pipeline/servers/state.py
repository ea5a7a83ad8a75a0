"""Files of the servers, all under home/.servers, which only its owner may enter.

`state.json` lists the processes that `dpar up` started, `auth` holds their login `user:password`.
"""

from __future__ import annotations

import os
import re
import secrets
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from conf.runtime import RuntimeConfig
from pipeline.processes import Service
from stages.runtime.errors import InputError

USER = "dpar"
_AUTH = re.compile(rf"{USER}:[\w-]{{32}}")
_OWNER_ONLY = 0o600


@dataclass(frozen=True)
class Addresses:
    """URLs of the servers, for a browser."""

    prefect: str
    mlflow: str


class State(BaseModel):
    """The processes that `dpar up` started, and their addresses once all of them answer."""

    model_config = ConfigDict(extra="forbid")

    services: tuple[Service, ...] = ()
    addresses: Addresses | None = None


def server_folder(runtime: RuntimeConfig) -> Path:
    """Folder of the servers' files."""
    return runtime.home.absolute() / ".servers"


def private_folder(runtime: RuntimeConfig) -> Path:
    """The folder of the servers' files, made if it is missing, and closed to other users.

    Raises:
        InputError: It belongs to another user.
    """
    folder = server_folder(runtime)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        try:
            folder.chmod(0o700)
        except PermissionError as error:
            raise InputError(
                f"{folder} belongs to another user and is open to others, expected a folder of your own: choose "
                "another home with DPAR_HOME"
            ) from error
    return folder


def empty_folder(runtime: RuntimeConfig) -> Path:
    """Current folder of the servers. Prefect reads settings from there, and imports code from there."""
    folder = private_folder(runtime) / "empty"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, atomically."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def new_auth() -> str:
    """A new login `user:password`."""
    return f"{USER}:{secrets.token_urlsafe(24)}"


def write_auth(runtime: RuntimeConfig, auth: str) -> None:
    """Keep the login of the servers."""
    write_private(_auth_path(runtime), auth + "\n")


def read_auth(runtime: RuntimeConfig) -> str | None:
    """The login of the servers; None if there is none, or if it is damaged."""
    with suppress(OSError, UnicodeDecodeError):
        auth = _auth_path(runtime).read_text(encoding="utf-8").strip()
        return auth if _AUTH.fullmatch(auth) else None
    return None


def write_state(runtime: RuntimeConfig, services: Sequence[Service], addresses: Addresses | None) -> None:
    """Write state.json. Without addresses, the servers are not up yet, but `down` can stop them."""
    state = State(services=tuple(services), addresses=addresses)
    write_private(_state_path(runtime), state.model_dump_json(indent=2) + "\n")


def read_state(runtime: RuntimeConfig) -> State:
    """What state.json says; an empty state if it is missing or damaged."""
    try:
        return State.model_validate_json(_state_path(runtime).read_bytes())
    except (OSError, ValidationError):
        return State()


def remove_state(runtime: RuntimeConfig) -> None:
    """Remove state.json and the login."""
    _state_path(runtime).unlink(missing_ok=True)
    _auth_path(runtime).unlink(missing_ok=True)


def _state_path(runtime: RuntimeConfig) -> Path:
    return server_folder(runtime) / "state.json"


def _auth_path(runtime: RuntimeConfig) -> Path:
    return server_folder(runtime) / "auth"
