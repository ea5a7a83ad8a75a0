"""`dpar up`, started in a folder full of hostile files and behind a proxy that swallows everything, then attacked.

The tests share one start of the servers and go in order: the last ones stop them.
"""

from __future__ import annotations

import http.client
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import browser
import hostile_folder
import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from conf.runtime import RuntimeConfig
from pipeline import servers
from pipeline.processes import HOST, answers, free_port
from pipeline.servers import state
from pipeline.servers.guard import basic, encoded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
UNTRACKED = "runtime.tracking=false"


@dataclass(frozen=True)
class Answer:
    status: int
    body: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Up:
    """The servers, and what `dpar up` said."""

    runtime: RuntimeConfig
    here: Path
    ran: Path
    said: str
    variables: dict[str, str]

    @property
    def folder(self) -> Path:
        return self.runtime.home / ".servers"

    @property
    def auth(self) -> str:
        return (self.folder / "auth").read_text().strip()

    @property
    def password(self) -> str:
        return self.auth.partition(":")[2]

    def dpar(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return hostile_folder.dpar(*arguments, folder=self.here, bin_folder=self.here.parent, **self.variables)

    def address(self, server: str) -> str:
        return f"http://{HOST}:{port_of(self, server)}"

    def ask(self, port: int, method: str, path: str, body: str = "", **headers: str) -> Answer:
        """Send a request; the header `Host` names this machine unless one is given."""
        connection = http.client.HTTPConnection(HOST, port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body or None, named)
        response = connection.getresponse()
        answer = Answer(response.status, response.read().decode(), {k.lower(): v for k, v in response.getheaders()})
        connection.close()
        return answer

    def prefect(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request as the page of the owner does."""
        text = "" if body is None else json.dumps(body)
        headers = {"Authorization": basic(self.auth), "Content_Type": "application/json"}
        answer = self.ask(self.runtime.prefect_port, method, f"/api{path}", text, **headers)
        assert answer.status < HTTPStatus.BAD_REQUEST, answer
        return json.loads(answer.body or "null")

    def run(self, *overrides: str) -> tuple[str, str]:
        """Run stage `dataset` from the page; returns the name and the message of the last state."""
        identity = self.prefect("GET", "/deployments/name/dpar-pipeline/local")["id"]
        parameters = {"preset": "tiny", "until_stage": "dataset", "overrides": [UNTRACKED, *overrides]}
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        run = self.prefect("POST", f"/deployments/{identity}/create_flow_run", body)
        while run["state_type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            time.sleep(0.5)
            run = self.prefect("GET", f"/flow_runs/{run['id']}")
        return run["state_name"], run["state"]["message"]

    def processes(self) -> list[psutil.Process]:
        """The processes that `dpar up` started, with all their children."""
        leaders = [psutil.Process(service.pid) for service in state.read_state(self.runtime).services]
        return [process for leader in leaders for process in (leader, *leader.children(recursive=True))]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("up")
    ran = folder / "ran"
    here = hostile_folder.make(folder / "here", ran)
    runtime = RuntimeConfig(home=folder / "home", prefect_port=free_port(), mlflow_port=free_port())
    variables = {
        "DPAR_HOME": str(runtime.home),
        "DPAR_PREFECT_PORT": str(runtime.prefect_port),
        "DPAR_MLFLOW_PORT": str(runtime.mlflow_port),
        "DPAR_ROOTS": json.dumps([str(image_root)]),
        "DPAR_DEVICE": "cpu",
    }
    done = hostile_folder.dpar("up", folder=here, bin_folder=folder, **variables)
    assert done.returncode == 0, done.stderr
    yield Up(runtime, here, ran, done.stdout, variables)
    servers.down(runtime)


def test_it_prints_the_addresses_and_the_login(up: Up) -> None:
    assert f"Prefect  http://{HOST}:{up.runtime.prefect_port}" in up.said
    assert f"Prefect: {up.auth}" in up.said
    assert f"password {up.password}" in up.said


def test_files_below_its_folder_are_for_the_owner_alone(up: Up) -> None:
    assert stat.S_IMODE(up.folder.stat().st_mode) == 0o700
    open_files = [path for path in up.folder.iterdir() if path.is_file() and path.stat().st_mode & 0o077]
    assert open_files == []


def test_the_login_is_in_no_command_line_no_log_and_no_database(up: Up) -> None:
    lines = [" ".join(process.cmdline()) for process in up.processes()]
    assert lines
    assert not any(up.password in line for line in lines)
    files = [path for path in up.folder.rglob("*") if path.is_file() and path.name != "auth"]
    assert len(files) > 3
    assert [path for path in files if up.password.encode() in path.read_bytes()] == []


def test_every_socket_that_listens_is_on_loopback(up: Up) -> None:
    listening = [
        connection.laddr
        for process in up.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {up.runtime.prefect_port, up.runtime.mlflow_port} <= {address.port for address in listening}
    assert {address.ip for address in listening} == {HOST}


PATHS = {
    "prefect": (
        *("/api/admin/version", "/api/admin/settings", "/api/deployments/filter", "/api/docs", "/api/openapi.json"),
        *("/api/flow_runs/filter", "/api/csrf-token?client=x", "/api//flows/count"),
    ),
    "mlflow": (
        *("/", "/version", "/ajax-api/2.0/mlflow/experiments/search?max_results=1", "/get-artifact?run_uuid=x&path=y"),
        *(
            "/api/2.0/mlflow-artifacts/artifacts",
            "/ajax-api/3.0/mlflow/assistant/config",
            "/graphql",
            "/api/3.0/mlflow/x",
        ),
        *("/ajax-api/2.0/mlflow/upload-artifact?run_uuid=x&path=y", "/static-files/index.html"),
    ),
}
TARGETS = [(server, path) for server, paths in PATHS.items() for path in paths]


def port_of(up: Up, server: str) -> int:
    return up.runtime.prefect_port if server == "prefect" else up.runtime.mlflow_port


@pytest.mark.parametrize(("server", "path"), TARGETS)
def test_without_the_login_no_request_is_answered(up: Up, server: str, path: str) -> None:
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
        for content_type in ("application/json", "text/plain"):
            for login in ({}, {"Authorization": basic("dpar:wrong")}, {"Authorization": "Bearer x"}):
                answer = up.ask(port_of(up, server), method, path, "{}", Content_Type=content_type, **login)
                assert answer.status == HTTPStatus.UNAUTHORIZED, (method, login)


@pytest.mark.parametrize("server", PATHS)
@pytest.mark.parametrize("path", ["/", "/health", "/api/health", "/ui-settings", "/dpar-login", "/api/admin/version"])
@pytest.mark.parametrize(
    "foreign",
    [
        *(
            {"Host": "evil.example"},
            {"Host": "evil.example:4200"},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
        ),
        *({"Origin": f"http://{HOST}:1"}, {"X_Forwarded_Host": HOST, "Host": "evil.example"}),
    ],
)
def test_a_foreign_page_is_refused_even_with_the_login(up: Up, server: str, path: str, foreign: dict[str, str]) -> None:
    for method in ("GET", "HEAD", "OPTIONS", "POST"):
        preflight = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
        headers = {"Authorization": basic(up.auth), **foreign, **(preflight if method == "OPTIONS" else {})}
        answer = up.ask(port_of(up, server), method, path, **headers)
        assert answer.status == HTTPStatus.FORBIDDEN
        assert not any(name.startswith("access-control-allow") for name in answer.headers)


def test_the_owner_is_answered(up: Up) -> None:
    login = {"Authorization": basic(up.auth)}
    assert up.ask(up.runtime.prefect_port, "GET", "/api/admin/version", **login).status == HTTPStatus.OK
    search = "/ajax-api/2.0/mlflow/experiments/search?max_results=1"
    assert up.ask(up.runtime.mlflow_port, "GET", search, **login).status == HTTPStatus.OK
    assert "<html" in up.ask(up.runtime.mlflow_port, "GET", "/", **login).body.lower()


def test_two_requests_that_once_ran_a_shell_command_change_nothing(up: Up) -> None:
    identity = up.prefect("GET", "/deployments/name/dpar-stage/local")["id"]
    steps = [{"prefect.deployments.steps.run_shell_script": {"script": f"touch {up.ran}"}}]
    for path, method, body in (
        (f"/api/deployments/{identity}", "PATCH", {"pull_steps": steps}),
        (f"/api/deployments/{identity}/create_flow_run", "POST", {"state": {"type": "SCHEDULED"}}),
    ):
        answer = up.ask(up.runtime.prefect_port, method, path, json.dumps(body), Content_Type="text/plain")
        assert answer.status == HTTPStatus.UNAUTHORIZED
    assert up.prefect("GET", f"/deployments/{identity}")["pull_steps"] in (None, [])
    assert up.prefect("POST", "/flow_runs/filter", {"deployments": {"id": {"any_": [identity]}}}) == []


needs_a_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium")


@needs_a_browser
def test_a_page_in_the_owners_browser_runs_nothing(up: Up, tmp_path: Path) -> None:
    """From another origin of this machine, which MLflow's own check allows."""
    identity = up.prefect("GET", "/deployments/name/dpar-stage/local")["id"]
    page = browser.attacking_page(
        tmp_path / "page", prefect=up.address("prefect"), mlflow=up.address("mlflow"), identity=identity, ran=up.ran
    )
    with page as url:
        said = browser.look(url, tmp_path / "profile")
    read = ("filter", "patch", "run", "settings")
    assert [f"{name}: failed" in said for name in read] == [True] * len(read)
    assert "run unread: opaque 0\n" in said  # a browser sends it, and hides the answer
    assert "experiment: opaque 0\nend" in said
    assert not up.prefect("GET", f"/deployments/{identity}")["pull_steps"]
    assert up.prefect("POST", "/flow_runs/filter", {"deployments": {"id": {"any_": [identity]}}}) == []
    search = "/ajax-api/2.0/mlflow/experiments/search?max_results=9"
    assert "evil" not in up.ask(up.runtime.mlflow_port, "GET", search, Authorization=basic(up.auth)).body


@needs_a_browser
@pytest.mark.parametrize("server", PATHS)
def test_a_name_that_is_pointed_at_this_machine_shows_nothing(up: Up, server: str, tmp_path: Path) -> None:
    url = f"http://evil.example:{port_of(up, server)}/"
    said = browser.look(url, tmp_path / "profile", f"--host-resolver-rules=MAP evil.example {HOST}")
    assert "the host is not this machine" in said


@needs_a_browser
@pytest.mark.parametrize(("server", "shown"), [("prefect", "Deployments"), ("mlflow", "Experiments")])
def test_open_leads_into_the_page_and_leaves_no_login_in_the_history(
    up: Up, server: str, shown: str, tmp_path: Path
) -> None:
    opened: list[str] = []
    addresses = servers.running(up.runtime)
    assert addresses is not None
    servers.open_pages(up.runtime, addresses, lambda url: not opened.append(url))  # type: ignore[func-returns-value]
    profile = tmp_path / "profile"
    assert shown in browser.look(next(url for url in opened if server in url), profile)
    history = (profile / "Default" / "History").read_bytes()
    assert b"/dpar-login" in history
    assert encoded(up.auth).encode() not in history


@pytest.mark.parametrize("path", ["events/in", "events/out", "logs/out", "task_runs/subscriptions/scheduled"])
def test_websockets_are_closed_to_strangers(up: Up, path: str) -> None:
    url = f"ws://{HOST}:{up.runtime.prefect_port}/api/{path}"
    for subprotocols in (None, ["prefect"]):
        for origin in ("http://evil.example", "null"):
            with pytest.raises(InvalidStatus), connect(url, origin=origin, subprotocols=subprotocols, proxy=None):  # type: ignore[arg-type]
                pass
    for token in (None, "", "dpar:wrong"):
        with connect(url, subprotocols=["prefect"], proxy=None) as socket:  # type: ignore[list-item]
            socket.send(json.dumps({"type": "auth", "token": token}))
            with pytest.raises(ConnectionClosed):
                socket.recv(timeout=30)


def test_a_run_from_the_page_makes_what_the_command_line_would(up: Up, image_root: Path) -> None:
    assert up.run(f"dataset.root={image_root}") == ("Completed", "1 made")
    made = list((up.runtime.home / "dataset").iterdir())
    assert len(made) == 1
    done = up.dpar("run", "--preset", "tiny", "--until", "dataset", "--set", f"dataset.root={image_root}")
    assert done.returncode == 0, done.stderr
    assert list((up.runtime.home / "dataset").iterdir()) == made


@pytest.mark.parametrize("override", ["runtime.home=/tmp/elsewhere", "dataset.root=/etc"])
def test_a_run_from_the_page_does_not_leave_its_folders(up: Up, override: str, image_root: Path) -> None:
    state_name, message = up.run(f"dataset.root={image_root}", override)
    assert state_name == "Failed"
    assert "in a run from Prefect's page, expected" in message


def test_a_run_from_the_command_line_is_recorded_by_these_servers(up: Up, image_root: Path) -> None:
    before = up.prefect("POST", "/flow_runs/count", {})
    arguments = ["--preset", "tiny", "--until", "dataset", "--force", "dataset", "--set", f"dataset.root={image_root}"]
    done = up.dpar("run", *arguments, "--set", UNTRACKED)
    assert done.returncode == 0, done.stderr
    assert up.prefect("POST", "/flow_runs/count", {}) == before + 1


def test_a_second_up_prints_the_same_login(up: Up) -> None:
    assert up.dpar("up").stdout == up.said


def test_no_command_has_run_a_file_of_the_current_folder(up: Up) -> None:
    for command in (["doctor"], ["status", "--preset", "tiny"]):
        up.dpar(*command)
    assert not up.ran.exists(), up.ran.read_text()


def test_the_hostile_files_are_found_where_the_current_folder_counts(up: Up, tmp_path: Path) -> None:
    """The test before this one can fail."""
    here = hostile_folder.make(tmp_path / "here", tmp_path / "ran")
    subprocess.run([sys.executable, "-m", "json"], cwd=here, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert "json.py" in (tmp_path / "ran").read_text()


@pytest.mark.parametrize("damage", [b"{", None])
def test_down_ends_everything_though_state_json_is_damaged(up: Up, damage: bytes | None) -> None:
    if damage is None:  # and once more, when nothing runs
        assert up.dpar("down").returncode == 0
        return
    processes = up.processes()
    assert len(processes) >= 3
    (up.folder / "state.json").write_bytes(damage)
    done = up.dpar("down")
    assert (done.returncode, done.stderr) == (0, "")
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    assert not answers(up.runtime.prefect_port, "/api/health")
    assert not answers(up.runtime.mlflow_port, "/health")
    assert not (up.folder / "auth").exists()
    assert not os.path.exists(up.folder / "state.json")
