import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.runtime import RuntimeConfig
from pipeline import servers
from pipeline.processes import HOST, ServerError, answers, free_port
from stages.runtime.artifact import write_json
from stages.runtime.errors import InputError


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[RuntimeConfig]:
    runtime = RuntimeConfig(home=tmp_path / "home", prefect_port=free_port(), mlflow_port=free_port())
    yield runtime
    servers.down(runtime)


@pytest.mark.parametrize("module", ["servers", "tracking.tracker", "serving.local", "serving.relay"])
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


def test_a_prefect_server_that_is_named_is_used(runtime: RuntimeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    with servers.prefect_server(runtime) as server:
        server.wait()
        assert server.api_url == "http://elsewhere/api"


def test_nothing_is_reported_home_and_a_persons_own_variables_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_SERVER_ANALYTICS_ENABLED", raising=False)
    monkeypatch.setenv("PREFECT_HOME", "/mine")
    found = servers.environment(RuntimeConfig())
    assert found["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert found["DO_NOT_TRACK"] == found["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert found["PREFECT_HOME"] == "/mine"
