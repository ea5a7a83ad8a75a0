import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from conf.environment import SERVERS
from conf.runtime import RuntimeConfig
from pipeline import servers
from pipeline.processes import HOST, ServerError, Service, answers, fetch, free_port, start
from pipeline.servers import commands, state
from pipeline.servers.guard import basic
from stages.runtime.artifact import write_json
from stages.runtime.errors import InputError


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[RuntimeConfig]:
    runtime = RuntimeConfig(home=tmp_path / "home", prefect_port=free_port(), mlflow_port=free_port())
    yield runtime
    servers.down(runtime)


@pytest.mark.parametrize("module", ["servers", "tracking.tracker", "serving.local", "serving.composite_observer"])
def test_neither_prefect_nor_mlflow_is_imported_before_it_is_needed(module: str) -> None:
    program = f"import sys, pipeline.{module}; print(sorted({{'prefect', 'mlflow', 'torch'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_port_in_use_is_reported_with_its_owner_and_how_to_choose_another(runtime: RuntimeConfig) -> None:
    with socket.socket() as other:
        other.bind((HOST, runtime.mlflow_port))
        other.listen()
        with pytest.raises(
            InputError, match=rf"port {runtime.mlflow_port} for mlflow is in use by .*pid {os.getpid()}.*"
        ):
            servers.up(runtime)
    assert not (runtime.home / ".servers" / "state.json").exists()


@pytest.mark.slow
def test_when_one_does_not_start_the_others_are_ended(runtime: RuntimeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "nonsense")
    with pytest.raises(ServerError, match="Prefect ended during startup"):
        servers.up(runtime)
    assert servers.running(runtime) is None
    assert not answers(runtime.mlflow_port, "/health")


def test_state_of_processes_that_have_died_counts_as_down(runtime: RuntimeConfig) -> None:
    gone = {"name": "Prefect", "pid": os.getpid(), "created": 1.0, "log": "log"}
    write_json(
        runtime.home / ".servers" / "state.json", {"services": [gone], "addresses": {"prefect": "", "mlflow": ""}}
    )
    assert servers.running(runtime) is None
    servers.down(runtime)  # the pid belongs to this test's process, which must survive


def made_up(runtime: RuntimeConfig, *services: Service) -> str:
    """State of servers that run, as `up` writes it; returns their login."""
    auth = state.new_auth()
    state.private_folder(runtime)
    state.write_auth(runtime, auth)
    state.write_state(runtime, services, servers.Addresses(f"http://{HOST}:{runtime.prefect_port}", "http://mlflow"))
    return auth


def test_a_prefect_server_that_is_named_is_used_with_its_own_login(
    runtime: RuntimeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(runtime)
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:mine")
    with servers.prefect_server(runtime) as server:
        server.wait()
        assert server.variables == {"PREFECT_API_URL": "http://elsewhere/api"}


@pytest.mark.parametrize("given", [{}, {"PREFECT_API_AUTH_STRING": "of:another server"}, {"PREFECT_API_URL": "{own}"}])
def test_the_server_of_up_is_used_with_its_login(
    runtime: RuntimeConfig, given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    auth, url = made_up(runtime), f"http://{HOST}:{runtime.prefect_port}/api"
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value.format(own=url))
    with servers.prefect_server(runtime) as server:
        assert server.variables == {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": auth}


def test_servers_whose_login_is_lost_count_as_down(runtime: RuntimeConfig) -> None:
    made_up(runtime)
    assert servers.running(runtime) is not None
    (runtime.home / ".servers" / "auth").unlink()
    assert servers.running(runtime) is None


STAND_IN = "import sys, time; time.sleep(60)"


def stand_in(runtime: RuntimeConfig, mark: str, *arguments: str) -> Service:
    """A process with the mark and the command line of a server."""
    environment = os.environ | {SERVERS: mark}
    command = [sys.executable, "-c", STAND_IN, *arguments]
    return start("stand-in", command, environment, runtime.home / ".servers" / "log", die_with_parent=True)


@pytest.mark.parametrize("damaged", [None, b"", b"{", b"[]", b'{"services": [], "addresses": null}'])
def test_down_ends_the_servers_of_its_home_without_a_usable_state(
    runtime: RuntimeConfig, tmp_path: Path, damaged: bytes | None
) -> None:
    folder = state.private_folder(runtime)
    ours = [stand_in(runtime, str(folder), each) for each in (commands.PREFECT_APP, commands.MLFLOW_APP, commands.RUNS)]
    others = [stand_in(runtime, str(folder)), stand_in(runtime, str(tmp_path), commands.PREFECT_APP)]
    try:
        while not all(psutil.Process(each.pid).cmdline() for each in (*ours, *others)):  # not yet executed
            time.sleep(0.01)
        if damaged is not None:
            (folder / "state.json").write_bytes(damaged)
        servers.down(runtime)
        assert not any(service.alive for service in ours)
        assert all(service.alive for service in others)
        assert not (folder / "state.json").exists()
    finally:
        for service in (*ours, *others):
            service.end()


def test_down_before_the_first_up_makes_no_folder(runtime: RuntimeConfig) -> None:
    servers.down(runtime)
    assert not runtime.home.exists()


@pytest.mark.slow
def test_two_servers_that_start_on_a_fresh_home_both_answer(runtime: RuntimeConfig) -> None:
    """Both create the database; one died of `table work_queue already exists`."""
    with servers.temporary_prefect_server(runtime) as first, servers.temporary_prefect_server(runtime) as second:
        for server in (first, second):
            server.wait()
            assert server.auth is not None
            port = int(server.api_url.split(":")[2].removesuffix("/api"))
            answers_in_turn = (fetch(port, "/api/admin/version", basic(server.auth)) for _ in range(6))
            assert any(answer is not None for answer in answers_in_turn)  # on a busy machine one takes over 5 s
            assert fetch(port, "/api/admin/version") is None
