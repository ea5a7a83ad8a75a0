"""The servers that `dpar up` starts, which take a while, and what runs on them until the last tests end them.

The flows run as from Prefect's page: through the server, a deployment, and a process that Prefect starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from odd_names import ODD_NAME
from waiting import wait_for

from conf.runtime import RuntimeConfig
from pipeline import servers
from pipeline.processes import HOST, answers, free_port
from pipeline.servers.guard import basic
from stages.runtime.artifact import read_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
_BUSY = 503
"""The server's answer while another process writes to its SQLite file; Prefect's own client asks again too."""


class Prefect:
    """Client of a Prefect server with the deployments; sends the requests that the page sends."""

    def __init__(self, runtime: RuntimeConfig, images: Path) -> None:
        self.runtime = runtime
        self.addresses = servers.up(runtime)
        self.api = f"{self.addresses.prefect}/api"
        self.auth = servers.read_auth(runtime) or ""
        self.images = images

    def call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", "authorization": basic(self.auth)}
        request = urllib.request.Request(self.api + path, data, headers)
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code != _BUSY:
                    raise
                error.close()
                time.sleep(0.5)

    def run(self, deployment: str, **parameters: Any) -> tuple[str, str, dict[str, str]]:
        """Run a deployment; returns the name and message of the final state, and the states of the tasks."""
        overrides = [f"dataset.root={self.images}", *parameters.pop("overrides", [])]
        identity = self.call(f"/deployments/name/{deployment}/local")["id"]
        body = {"parameters": {"preset": "tiny", "overrides": overrides, **parameters}, "state": {"type": "SCHEDULED"}}
        run = self.call(f"/deployments/{identity}/create_flow_run", body)
        while run["state_type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            time.sleep(0.5)
            run = self.call(f"/flow_runs/{run['id']}")
        tasks = self.call("/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
        return run["state_name"], run["state"]["message"], {task["name"]: task["state_name"] for task in tasks}

    def messages(self) -> list[str]:
        return [log["message"] for log in self.call("/logs/filter", {"sort": "TIMESTAMP_ASC"})]


# Importing MLflow and writing to it takes longer than such a run; one run of the pipeline is tracked.
UNTRACKED = "runtime.tracking=false"


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> Iterator[Prefect]:
    runtime = RuntimeConfig(
        home=tmp_path_factory.mktemp("servers") / ODD_NAME,
        prefect_port=free_port(),
        mlflow_port=free_port(),
        device="cpu",
        roots=(image_root,),
    )
    try:
        yield Prefect(runtime, image_root)
    finally:
        servers.down(runtime)


def test_a_run_makes_what_is_missing_and_the_next_shows_it_cached(prefect: Prefect) -> None:
    assert prefect.run("dpar-pipeline", until_stage="dataset") == ("Completed", "1 made", {"dataset": "Completed"})
    again = prefect.run("dpar-pipeline", until_stage="dataset", overrides=[UNTRACKED])
    assert again == ("Completed", "1 cached", {"dataset": "Cached"})
    assert any("45 images of 3 classes" in message for message in prefect.messages())  # the stage's own log


def test_one_stage_can_be_made_again(prefect: Prefect) -> None:
    made = prefect.run("dpar-stage", stage="dataset", force=True, overrides=[UNTRACKED])
    assert made == ("Completed", "1 made", {"dataset": "Completed"})


def test_a_user_error_is_one_line(prefect: Prefect) -> None:
    state, message, tasks = prefect.run("dpar-pipeline", overrides=["train.nonsense=1"])
    assert (state, tasks) == ("Failed", {})
    assert message.startswith("train.nonsense: unknown setting")


def test_the_form_offers_names_and_the_server_refuses_others(prefect: Prefect) -> None:
    form = prefect.call("/deployments/name/dpar-pipeline/local")["parameter_openapi_schema"]["properties"]
    assert "tiny" in form["preset"]["enum"]
    assert "static" in form["ablation"]["enum"]
    assert form["force"]["items"]["enum"] == form["until_stage"]["enum"]
    assert all(field["description"] for field in form.values())
    with pytest.raises(urllib.error.HTTPError) as refused:
        prefect.run("dpar-pipeline", until_stage="nowhere")
    refused.value.close()
    assert refused.value.code == 409


def test_a_run_from_this_machine_raises_what_the_stage_raised(prefect: Prefect, tmp_path: Path) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "broken.png").write_bytes(b"no image")
    overrides = [f"dataset.root={tmp_path / 'images'}", f"runtime.home={tmp_path / 'home'}"]
    program = (
        "from pipeline.launch import StageFailed\nfrom pipeline.serving.local import run_pipeline\n"
        f"try:\n    run_pipeline('tiny', None, {overrides})\n"
        "except StageFailed as error:\n    print(error.code, error.stage)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PREFECT_API_URL": prefect.api, "PREFECT_API_AUTH_STRING": prefect.auth},
        capture_output=True,
        text=True,
        check=False,
    )
    # On a busy machine a warning may say that Prefect is slow: that is no error of the stage.
    said = [line for line in done.stderr.splitlines() if not line.startswith("Prefect (")]
    assert (done.stdout, said) == ("2 dataset\n", [])
    (run,) = prefect.call("/flow_runs/filter", {"flow_runs": {"name": {"any_": [f"tiny {overrides[0]}"]}}})
    assert run["state_name"] == "Failed"
    assert run["state"]["message"].startswith("stage dataset failed: ")
    assert not any("Encountered exception" in message for message in prefect.messages())


def test_a_run_that_prefect_missed_is_shown_when_it_is_back(prefect: Prefect) -> None:
    with subprocess.Popen(command(prefect, "missed"), env=elsewhere(), stderr=subprocess.PIPE, text=True) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Prefect (http://127.0.0.1:" in said
    wait_for(lambda: shown(prefect, "missed")[0]["state_name"] == "Completed")
    run, tasks = shown(prefect, "missed")
    assert run["state"]["message"].partition(",")[0] == "1 made"
    assert run["parameters"]["until_stage"] == "dataset"
    assert tasks == {"dataset": "Completed"}
    logs = prefect.call("/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
    assert any("45 images of 3 classes" in log["message"] for log in logs)


@pytest.mark.parametrize(
    ("number", "state"),
    [
        (signal.SIGKILL, "Crashed"),
        (signal.SIGHUP, "Crashed"),
        (signal.SIGTERM, "Crashed"),
        (signal.SIGINT, "Cancelled"),
    ],
)
def test_a_run_that_a_signal_ends_does_not_stay_running(prefect: Prefect, number: signal.Signals, state: str) -> None:
    name = number.name.lower()
    with subprocess.Popen(command(prefect, name), stdout=subprocess.DEVNULL, preexec_fn=default_signals) as process:
        stage = wait_for(lambda: stage_of(process.pid))
        if number in (signal.SIGKILL, signal.SIGHUP):
            stage.suspend()  # until Prefect knows of it
            wait_for(lambda: shown(prefect, name)[1] == {"dataset": "Running"})
        process.send_signal(number)
        process.wait(60)
        with contextlib.suppress(psutil.NoSuchProcess):
            stage.resume()
    wait_for(lambda: shown(prefect, name)[0]["state_name"] == state)
    assert shown(prefect, name)[1] == {"dataset": state}
    assert list((prefect.runtime.home / ".servers" / "flow-runs").iterdir()) == []


def test_a_run_can_be_cancelled_on_the_page(prefect: Prefect) -> None:
    identity = prefect.call("/deployments/name/dpar-pipeline/local")["id"]
    parameters = {"preset": "tiny", "until_stage": "dataset", "force": ["dataset"]}
    overrides = [f"dataset.root={prefect.images}", UNTRACKED]
    body = {"parameters": parameters | {"overrides": overrides}, "state": {"type": "SCHEDULED"}}
    run = prefect.call(f"/deployments/{identity}/create_flow_run", body)
    runs = read_json(prefect.runtime.home / ".servers" / "state.json")["services"][-1]["pid"]
    stage = wait_for(lambda: stage_of(runs))
    prefect.call(f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLING"}})
    wait_for(lambda: prefect.call(f"/flow_runs/{run['id']}")["state_name"] == "Cancelled")
    assert not stage.is_running()
    (task,) = prefect.call("/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    assert task["state_name"] == "Crashed"


def test_a_second_up_starts_nothing(prefect: Prefect) -> None:
    first = pids(prefect.runtime)
    assert servers.up(prefect.runtime) == prefect.addresses
    assert pids(prefect.runtime) == first


def test_up_serves_and_down_leaves_nothing(prefect: Prefect) -> None:
    runtime, addresses = prefect.runtime, prefect.addresses
    assert addresses.prefect == f"http://{HOST}:{runtime.prefect_port}"
    assert answers(runtime.prefect_port, "/api/health")
    assert answers(runtime.mlflow_port, "/health")
    with servers.prefect_server(runtime) as server:
        assert server.api_url == f"{addresses.prefect}/api"
    started = pids(runtime)
    servers.down(runtime)
    assert servers.running(runtime) is None
    assert not answers(runtime.prefect_port, "/api/health")
    assert not answers(runtime.mlflow_port, "/health")
    assert not any(os.path.exists(f"/proc/{pid}") for pid in started)


def test_the_temporary_server_is_gone_after_the_body_however_it_ends(prefect: Prefect) -> None:
    ports = []

    def body() -> None:
        with servers.temporary_prefect_server(prefect.runtime) as server:
            server.wait()
            ports.append(int(server.api_url.split(":")[2].removesuffix("/api")))
            assert answers(ports[0], "/api/health")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()
    assert not answers(ports[0], "/api/health")


def command(prefect: Prefect, name: str) -> list[str]:
    """A `dpar run` in the servers' home over a folder of this name, so that Prefect's list shows the name."""
    images = prefect.images.parent / name
    with contextlib.suppress(FileExistsError):
        images.symlink_to(prefect.images)
    settings = {"dataset.root": images, "runtime.home": prefect.runtime.home, "runtime.tracking": "false"}
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    program = [sys.executable, "-m", "pipeline.cli.main", "run", "--preset", "tiny"]
    return [*program, "--until", "dataset", "--force", "dataset", *overrides]


def default_signals() -> None:
    """Undo that a shell lets processes in the background ignore signals."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def elsewhere() -> dict[str, str]:
    """An environment in which Prefect does not answer."""
    return os.environ | {"PREFECT_API_URL": f"http://{HOST}:{free_port()}/api"}


def shown(prefect: Prefect, name: str) -> tuple[Any, dict[str, str]]:
    """The flow run over a folder of images, and the states of its tasks."""

    def find() -> Any:
        return prefect.call("/flow_runs/filter", {"flow_runs": {"name": {"like_": f"/{name}"}}})

    (run,) = wait_for(find)
    tasks = prefect.call("/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    return run, {task["name"]: task["state_name"] for task in tasks}


def stage_of(pid: int) -> psutil.Process | None:
    """The process of stage `dataset` below another one."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            if "stages.dataset" in process.cmdline():
                return process
    return None


def pids(runtime: RuntimeConfig) -> list[int]:
    return [service["pid"] for service in read_json(runtime.home / ".servers" / "state.json")["services"]]
