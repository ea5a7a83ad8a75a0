"""Addresses under which SQLAlchemy opens a database where it lies, whatever the folder is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from conf.runtime import RuntimeConfig
from pipeline.servers import environment
from pipeline.servers.databases import sqlite_address


@pytest.mark.parametrize(
    "name", ["plain", "what?", "?a=b&uri=false", "#1", "50%", "%3F", "a?%41#", "a b;c", "ä?", "@:x"]
)
def test_the_database_lies_where_its_path_says(name: str, tmp_path: Path) -> None:
    path = tmp_path / name / "x.db"
    path.parent.mkdir()
    engine = create_engine(sqlite_address(path))
    with engine.begin() as connection:
        connection.execute(text("create table t (x)"))
    engine.dispose()
    assert [found.name for found in tmp_path.rglob("*.db")] == ["x.db"]
    assert path.stat().st_size > 0


def test_a_plain_path_has_a_plain_address() -> None:
    assert sqlite_address(Path("/a-b/x.db")) == "sqlite:////a-b/x.db"
    assert sqlite_address(Path("/a b/x.db"), "aiosqlite") == "sqlite+aiosqlite:////a%20b/x.db"


def test_prefect_gets_an_address_only_where_its_own_would_lead_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "PREFECT_API_DATABASE_CONNECTION_URL"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    assert name not in environment(RuntimeConfig(home=Path("/a-b")))
    odd = RuntimeConfig(home=Path("/a?b"))
    assert environment(odd)[name] == "sqlite+aiosqlite:////a%3Fb/.servers/prefect/prefect.db"
    monkeypatch.setenv("PREFECT_HOME", "/mine")
    assert name not in environment(odd)
