import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.tracking import view
from pipeline.tracking.view import StoreError, first_line, require_usable


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "a # database?.db"
    with closing(sqlite3.connect(path)) as opened:
        opened.execute("CREATE TABLE runs (name TEXT)")
        opened.executemany("INSERT INTO runs VALUES (?)", [("x" * 100,)] * 1000)
        opened.commit()
    return path


def test_a_database_that_can_be_written_is_left_as_it_is(database: Path, tmp_path: Path) -> None:
    before = database.read_bytes()
    require_usable(database)
    assert database.read_bytes() == before
    require_usable(tmp_path / "missing.db")
    assert [path.name for path in tmp_path.iterdir()] == [database.name]


def test_a_damaged_database_is_named_and_left_as_it_is(database: Path) -> None:
    for damaged in (b"no database at all, but long enough to be one\n" * 100, database.read_bytes()[:4000]):
        database.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"database\?\.db is damaged \(.*\); it is left as it is: move it away"):
            require_usable(database)
        assert database.read_bytes() == damaged


def test_a_locked_database_is_told_from_a_damaged_one(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "_BUSY_S", 0.05)
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="database is locked"):
            require_usable(database)
        other.execute("ROLLBACK")
    require_usable(database)


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open database file"):
        require_usable(tmp_path)


def test_an_error_is_one_line() -> None:
    assert first_line(ValueError("\n  one\ntwo")) == "one"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
