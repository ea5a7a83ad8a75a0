"""Addresses of SQLite databases for SQLAlchemy, which Prefect and MLflow use."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote


def sqlite_address(path: Path, driver: str = "pysqlite") -> str:
    """Address of a database file. SQLAlchemy takes what follows a `?` for options, and decodes the path.

    Args:
        path: Absolute path of the file.
        driver: Module that opens it.
    """
    quoted = quote(str(path))
    # MLflow makes the folder of the undecoded path after a plain `sqlite:`.
    named = "sqlite" if driver == "pysqlite" and quoted == str(path) else f"sqlite+{driver}"
    return f"{named}:///{quoted}"
