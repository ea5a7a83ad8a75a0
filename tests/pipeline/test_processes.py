import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipeline import processes
from pipeline.processes import (
    CODE_ROOT,
    HOST,
    ServerError,
    Service,
    answers,
    exempt_loopback,
    free_port,
    listener,
    own_python,
    python_path,
    start,
    wait_until,
)


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Service]:
    service = start("sleeper", ["sleep", "60"], os.environ, tmp_path / "log", die_with_parent=True)
    yield service
    service.end()


def wait_for(path: Path) -> str:
    while not path.exists() or not path.read_text().endswith("\n"):
        time.sleep(0.02)
    return path.read_text()


def test_a_process_that_only_has_the_same_pid_is_left_alone(sleeper: Service) -> None:
    impostor = replace(sleeper, created=sleeper.created - 60)
    assert not impostor.alive
    impostor.end()
    assert sleeper.alive


def test_end_ends_the_whole_group_though_a_grandchild_ignores_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_GRACE_S", 0.2)
    script = f"sh -c 'trap \"\" TERM; echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done' & wait"
    service = start("family", ["sh", "-c", script], os.environ, tmp_path / "log", die_with_parent=True)
    grandchild = psutil.Process(int(wait_for(tmp_path / "pid")))
    service.end()
    assert not service.alive
    deadline = time.monotonic() + 10
    while grandchild.is_running() and grandchild.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE
    service.end()  # once more harms nobody


def test_a_process_dies_with_its_killed_parent_on_request(tmp_path: Path) -> None:
    program = (
        "import os, time\nfrom pathlib import Path\nfrom pipeline.processes import start\n"
        f"service = start('x', ['sleep', '60'], os.environ, Path({str(tmp_path / 'log')!r}), die_with_parent=True)\n"
        "print(service.pid, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_server_that_ends_during_startup_is_reported_with_its_last_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('no room for me'); sys.exit(3)"]
    service = start("Thing", command, os.environ, tmp_path / "thing.log", die_with_parent=False)
    with pytest.raises(ServerError, match=r"Thing ended during startup: no room for me \(log: .*thing\.log\)"):
        wait_until(service, lambda: False, timeout_s=30)


def test_a_server_that_takes_too_long_is_reported(sleeper: Service) -> None:
    with pytest.raises(ServerError, match="sleeper did not answer within 0 s: no output"):
        wait_until(sleeper, lambda: False, timeout_s=0)


def test_the_listener_of_a_taken_port_is_named() -> None:
    with socket.socket() as server:
        server.bind((HOST, 0))
        server.listen()
        port = server.getsockname()[1]
        assert f"(pid {os.getpid()})" in str(listener(port))
    assert listener(port) is None


def test_nobody_answers_on_a_free_port() -> None:
    assert not answers(free_port(), "/")


PROXIES = {"http_proxy": "http://proxy:1", "ALL_PROXY": "http://proxy:1"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": ""}, "127.0.0.1,localhost"),
        ({"no_proxy": "a.example, b.example"}, "a.example,b.example,127.0.0.1,localhost"),
        ({"NO_PROXY": "localhost"}, "localhost,127.0.0.1"),
        ({"NO_PROXY": "*"}, "*"),
        ({"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}, "127.0.0.1,localhost"),
    ],
)
def test_no_proxy_catches_traffic_of_this_machine(given: dict[str, str], expected: str) -> None:
    environment = PROXIES | given
    exempt_loopback(environment)
    assert environment == PROXIES | {"no_proxy": expected, "NO_PROXY": expected}


def test_each_spelling_of_no_proxy_keeps_its_hosts() -> None:
    environment = {"no_proxy": "a.example", "NO_PROXY": "b.example"}
    exempt_loopback(environment)
    assert environment == {"no_proxy": "a.example,127.0.0.1,localhost", "NO_PROXY": "b.example,127.0.0.1,localhost"}


@pytest.mark.parametrize("inherited", ["", ":", "{other}", ":{other}:", "{other}::{other}"])
def test_a_child_imports_ours_and_nothing_from_its_current_folder(
    tmp_path: Path, inherited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "here", tmp_path / "other"
    for name in ("json", "sitecustomize", "pipeline/__init__", "conf/__init__"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text("raise SystemExit('code of the current folder')")
    other.mkdir()
    monkeypatch.setenv("PYTHONPATH", inherited.format(other=other))
    program = "import conf, json, pipeline, sys; print(conf.__file__, pipeline.__file__, sys.path.count(''))"
    command = own_python("-c", program)
    environment = os.environ | {"PYTHONPATH": python_path(CODE_ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    found = [CODE_ROOT / "conf" / "__init__.py", CODE_ROOT / "pipeline" / "__init__.py", 0]
    assert (done.stdout.split(), done.stderr) == ([str(each) for each in found], "")


def test_only_the_owner_can_read_a_log_also_one_made_before(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch(mode=0o644)
    start("true", ["true"], os.environ, log, die_with_parent=True).end()
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_process_starts_in_the_folder_and_with_the_umask_it_is_given(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    command = ["sh", "-c", "touch made; echo done > ../done"]
    service = start("maker", command, os.environ, tmp_path / "log", die_with_parent=True, folder=folder, umask=0o077)
    wait_for(tmp_path / "done")
    service.end()
    assert (folder / "made").stat().st_mode & 0o777 == 0o600
