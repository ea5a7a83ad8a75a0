import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from conf.load import load_settings
from conf.runtime import RuntimeConfig
from pipeline.processes import CODE_ROOT, HOST, Service
from pipeline.servers import commands
from pipeline.servers.state import new_auth

AUTH = new_auth()
Started = list[tuple[Sequence[str], Mapping[str, str], Path | None]]


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeConfig:
    return RuntimeConfig(home=tmp_path / "home", roots=(tmp_path / "a", tmp_path / "b"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Command line, environment and current folder of each process that would be started."""
    started: Started = []

    def start(name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, **options: Any) -> Service:
        started.append((command, environment, options["folder"]))
        return Service(name, 1, 1.0, str(log))

    monkeypatch.setattr(commands, "start", start)
    return started


def start_all(runtime: RuntimeConfig) -> None:
    commands.start_prefect(runtime, 4200, AUTH, die_with_parent=False)
    commands.start_mlflow(runtime, 5000, AUTH)
    commands.start_runs(runtime, {"PREFECT_API_URL": "http://here/api", "PREFECT_API_AUTH_STRING": AUTH})


def test_no_command_line_has_the_login_and_every_environment_has(runtime: RuntimeConfig, started: Started) -> None:
    start_all(runtime)
    assert len(started) == 3
    for command, environment, _ in started:
        assert AUTH.partition(":")[2] not in " ".join(command)
        assert AUTH in environment.values()


def test_servers_listen_on_loopback_only_and_import_nothing_from_the_current_folder(
    runtime: RuntimeConfig, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UVICORN_UDS", "/tmp/socket")
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}/mine{os.pathsep}")
    start_all(runtime)
    for command, environment, _ in started:
        assert "-P" in command[:2]
        assert environment["PYTHONSAFEPATH"] == "1"
        assert environment["PYTHONPATH"].split(os.pathsep) == [str(CODE_ROOT), "/mine"]
        assert "UVICORN_UDS" not in environment or "uvicorn" not in command
    for command, _, _ in started[:2]:
        assert command[command.index("--host") + 1] == HOST
        assert command[command.index("--app-dir") + 1] == str(CODE_ROOT)  # uvicorn's default is the current folder


def test_what_reads_settings_or_code_from_its_current_folder_has_an_empty_one(
    runtime: RuntimeConfig, started: Started
) -> None:
    start_all(runtime)
    for _, _, folder in (started[0], started[2]):
        assert folder is not None
        assert list(folder.iterdir()) == []
    assert started[2][1]["DPAR_STARTED_IN"] == os.getcwd()


def test_runs_of_the_page_have_the_runtime_settings_of_up(
    runtime: RuntimeConfig, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = runtime.model_copy(update={"threads": 3, "slurm": runtime.slurm.model_copy(update={"hours": 2.0})})
    commands.start_runs(chosen, {})
    for name, value in started[0][1].items():
        if name.startswith("DPAR_"):
            monkeypatch.setenv(name, value)
    assert load_settings()[1] == chosen


def test_a_persons_own_variables_win_but_those_that_close_the_servers(
    runtime: RuntimeConfig, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", "/mine")
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "true")
    assert commands.environment(runtime)["PREFECT_HOME"] == "/mine"
    assert commands.environment(runtime)["PREFECT_SERVER_ANALYTICS_ENABLED"] == "true"
    monkeypatch.delenv("PREFECT_HOME")
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "")
    monkeypatch.setenv("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "*")
    start_all(runtime)
    assert started[0][1]["PREFECT_SERVER_API_AUTH_STRING"] == AUTH
    assert started[0][1]["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == f"http://{HOST}:4200"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "{home}/logging.yml"),
        ({"PREFECT_LOGGING_CONFIG_PATH": "/mine.yml"}, "/mine.yml"),
        ({"PREFECT_LOGGING_SETTINGS_PATH": "/mine.yml"}, None),
    ],
)
def test_no_file_of_the_current_folder_names_a_logging_configuration(
    runtime: RuntimeConfig, variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = commands.environment(runtime)
    assert found.get("PREFECT_LOGGING_CONFIG_PATH") == (expected and expected.format(home=found["PREFECT_HOME"]))


def test_nothing_is_reported_home(runtime: RuntimeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_SERVER_ANALYTICS_ENABLED", raising=False)
    found = commands.environment(runtime)
    assert found["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert found["DO_NOT_TRACK"] == found["MLFLOW_DISABLE_TELEMETRY"] == "true"
