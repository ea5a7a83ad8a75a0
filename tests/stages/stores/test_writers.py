"""Writers that are killed, or meet a full disk: what they finished stays, and the rest comes out the same."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.runtime.artifact import write_atomic
from stages.stores.tokens import TokenStore, token_writer
from stages.stores.verify import artifact_damage

SCRIPT = Path(__file__).with_name("writers.py")
ROOT = Path(__file__).parents[3]


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("writers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


writers = load_script()


def run(*command: str | Path) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    writers.write(folder / "tokens.zarr")
    token_writer(folder / "tokens.zarr", writers.FACTS).finish()
    return folder


@pytest.mark.slow
def test_eight_writers_killed_twelve_times_end_with_the_bytes_of_one(tmp_path: Path, undisturbed: Path) -> None:
    said = run(sys.executable, SCRIPT, "kill", tmp_path / "tokens.zarr")
    assert said["killed"] > 40  # most of 12 x 8 were in the middle of their units
    assert 0 < said["units_before"] < writers.UNITS
    assert said["failed"] == 0
    assert not list((tmp_path / "tokens.zarr").rglob("*.partial"))
    assert content(tmp_path / "tokens.zarr") == content(undisturbed / "tokens.zarr")
    assert not list(artifact_damage(tmp_path, []))


def may_mount() -> bool:
    command = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="file systems cannot be mounted here")
def test_a_full_disk_keeps_what_is_finished_and_goes_on_when_there_is_room(tmp_path: Path, undisturbed: Path) -> None:
    """On a file system of 800 KB of its own, seen by the writer alone and gone with it."""
    shell = 'mount -t tmpfs -o size=800k tmpfs "$1" && exec "$2" "$3" full "$1/tokens.zarr"'
    said = run("unshare", "--mount", "--map-root-user", "sh", "-c", shell, "-", tmp_path, sys.executable, SCRIPT)
    assert said["errno"] == "ENOSPC"
    assert said["partials"] == 0
    assert 0 < said["done"] < writers.UNITS
    assert said["kept"] >= said["done"] * (writers.VIEWS + 1)
    assert said["digest"] == TokenStore.open(undisturbed / "tokens.zarr").digest


def test_a_file_too_large_for_the_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomic(tmp_path / "file", lambda file: file.write(bytes(2000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(tmp_path) == {"file": b"before"}
