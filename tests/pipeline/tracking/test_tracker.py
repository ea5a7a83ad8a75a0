"""MLflow has the complete run, even if the server or the run was down or killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for

from conf.load import load_settings
from conf.runtime import RuntimeConfig
from pipeline import servers
from pipeline.cache.manifest import Manifest, Parts, content_digest, key_of
from pipeline.cache.store import Cache
from pipeline.processes import HOST, Service, answers, free_port, wait_until
from pipeline.runner import Observer, StageResult
from pipeline.tracking import sender
from pipeline.tracking.journal import Journal
from pipeline.tracking.metric_tail import StageRun
from pipeline.tracking.tracker import RunStart, Tracker, mlflow_server, recorded, sync
from stages.runtime.errors import InputError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),  # of MLflow's own queries
]
SETTINGS, _ = load_settings("tiny")


AUTH = "dpar:a-login-of-this-test"
DIGEST = content_digest({})  # content digest of all artifacts here, which list no files


def parts(stage: str) -> Parts:
    inputs = {"tokenize": DIGEST} if stage == "evaluate" else {}
    common = {"schema": 2, "settings": {}, "code": [], "packages": {}, "external": None}
    return {**common, "stage": stage, "inputs": inputs}


def key(stage: str) -> str:
    return key_of(parts(stage))


class Run:
    """A fake runner: makes artifacts in a home and calls a tracker."""

    def __init__(self, runtime: RuntimeConfig) -> None:
        self.runtime, self.cache = runtime, Cache(runtime.home)

    @contextmanager
    def tracker(self, name: str = "tiny") -> Iterator[Observer]:
        """Record a run, and send it to MLflow while it goes on."""
        start = RunStart(name, {"preset": "tiny", "ablation": "none"}, SETTINGS.model_dump(mode="json"))
        with recorded(start, [mlflow_server(self.runtime)]) as (tracker,):
            yield tracker

    def start(self, tracker: Observer, stage: str, steps: range) -> Path:
        """Start or resume a stage that has logged these steps."""
        work = self.cache.work(key(stage))
        tracker.stage_started(stage, key(stage), work)
        (work / "record").mkdir(parents=True, exist_ok=True)
        partial = work / "record" / "metrics.partial"
        partial.write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in steps))
        os.replace(partial, work / "record" / "metrics.jsonl")
        return work

    def finish(self, tracker: Observer, stage: str, inputs: dict[str, str], **metrics: float) -> StageResult:
        work, path = self.cache.work(key(stage)), self.cache.path(key(stage))
        (work / "views").mkdir()
        (work / "views" / "grid.png").write_bytes(b"a picture")
        assert inputs == parts(stage)["inputs"]
        facts = {"key": key(stage), "stage": stage, "parts": parts(stage), "definitions": {}, "digest": DIGEST}
        manifest = Manifest(**facts, files={}, created=1.0, duration_s=2.0)
        (work / "manifest.json").write_text(json.dumps(manifest.sealed()))
        path.parent.mkdir()
        os.rename(work, path)
        result = StageResult(stage, "ran", key(stage), path, DIGEST, metrics, 2.0)
        tracker.stage_finished(result)
        return result


class Known:
    """Reads what MLflow has received."""

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)

    def runs(self, kind: str) -> list[Any]:
        experiment = self.client.get_experiment_by_name("dpar")
        assert experiment is not None
        found = self.client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'")
        return sorted(found, key=lambda run: run.info.start_time)

    def steps(self, run: Any, metric: str = "loss") -> list[int]:
        return [point.step for point in self.client.get_metric_history(run.info.run_id, metric)]

    def files(self, run: Any) -> set[str]:
        return {file.path for file in self.client.list_artifacts(run.info.run_id)}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables; creating them takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def home(tmp_path: Path, empty_store: Path) -> Path:
    (tmp_path / "home" / ".servers").mkdir(parents=True)
    (tmp_path / "home" / ".servers" / "mlflow.db").write_bytes(empty_store.read_bytes())
    return tmp_path / "home"


@pytest.fixture
def run(home: Path) -> Run:
    return Run(RuntimeConfig(home=home))


def known(run: Run) -> Known:
    return Known(servers.mlflow_uri(run.runtime))


def journals(run: Run) -> list[Path]:
    return list((run.runtime.home / ".servers" / "tracking").iterdir())


def test_a_run_is_one_row_with_a_row_below_it_for_each_stage_that_ran(run: Run) -> None:
    with run.tracker() as tracker:
        run.start(tracker, "tokenize", range(1, 3))
        first = run.finish(tracker, "tokenize", {}, num_tokens=64.0)
        run.start(tracker, "evaluate", range(1, 4))
        run.finish(tracker, "evaluate", {"tokenize": first.digest}, fd_lite0=12.5, loss=1 / 3)
    mlflow = known(run)
    (pipeline,) = mlflow.runs("pipeline")
    assert pipeline.info.status == "FINISHED"
    assert pipeline.data.params["train.training.steps"] == "8"
    assert pipeline.data.metrics == {"tokenize.num_tokens": 64.0, "fd_lite0": 12.5, "loss": 1 / 3}
    assert pipeline.data.tags["preset"] == "tiny"
    assert {"settings.yaml", "grid.png", "scores.md"} <= mlflow.files(pipeline)
    by_name = {child.info.run_name: child for child in mlflow.runs("stage")}
    tokenize, evaluate = by_name["tokenize"], by_name["evaluate"]
    assert {child.data.tags["mlflow.parentRunId"] for child in (tokenize, evaluate)} == {pipeline.info.run_id}
    assert pipeline.data.tags["stage.tokenize.run_id"] == tokenize.info.run_id
    assert evaluate.data.tags["stage.key"] == key("evaluate")
    assert mlflow.steps(evaluate) == [1, 2, 3]  # the final loss equals that of step 3 and adds no point
    assert {"manifest.json", "grid.png"} <= mlflow.files(evaluate)
    (made_from,) = evaluate.inputs.dataset_inputs
    assert (made_from.dataset.name, made_from.dataset.digest) == ("tokenize", first.digest[:36])
    assert json.loads(made_from.dataset.source)["uri"] == first.path.as_uri()
    assert journals(run) == []


def test_a_cached_stage_is_a_link_to_the_run_that_made_it(run: Run) -> None:
    with run.tracker() as tracker:
        run.start(tracker, "tokenize", range(1, 3))
        made = run.finish(tracker, "tokenize", {}, num_tokens=64.0)
    with run.tracker("again") as tracker:
        cached = StageResult("tokenize", "cached", made.key, made.path, made.digest, made.metrics, 2.0)
        tracker.stage_finished(cached)
    mlflow = known(run)
    (stage,) = mlflow.runs("stage")
    _, again = mlflow.runs("pipeline")
    assert again.data.tags["stage.tokenize.state"] == "cached"
    assert again.data.tags["stage.tokenize.run_id"] == stage.info.run_id
    assert again.data.metrics == {"tokenize.num_tokens": 64.0}
    (reused,) = again.inputs.dataset_inputs
    assert (reused.dataset.name, reused.tags[0].value) == ("tokenize", "reused")


def test_a_failed_stage_says_why_and_another_attempt_goes_on_in_its_run(run: Run) -> None:
    with run.tracker() as tracker:
        run.start(tracker, "train", range(1, 5))
        tracker.stage_failed("train", RuntimeError("loss is NaN"))
    with run.tracker() as tracker:
        run.start(tracker, "train", range(1, 7))
        run.finish(tracker, "train", {})
    mlflow = known(run)
    assert [pipeline.info.status for pipeline in mlflow.runs("pipeline")] == ["FAILED", "FINISHED"]
    (stage,) = mlflow.runs("stage")
    assert stage.info.status == "FINISHED"
    assert stage.data.tags["last_error"] == "loss is NaN"
    assert mlflow.steps(stage) == [1, 2, 3, 4, 5, 6]


def test_a_stage_that_is_made_again_by_force_has_a_run_of_its_own(run: Run) -> None:
    with run.tracker() as tracker:
        run.start(tracker, "train", range(1, 5))
        made = run.finish(tracker, "train", {})
    shutil.rmtree(made.path.parent)
    with run.tracker() as tracker:
        run.start(tracker, "train", range(1, 3))
        run.finish(tracker, "train", {})
    mlflow = known(run)
    assert [mlflow.steps(stage) for stage in mlflow.runs("stage")] == [[1, 2, 3, 4], [1, 2]]


def test_after_a_kill_the_stage_goes_on_in_its_run_and_no_step_is_there_twice(run: Run) -> None:
    journal = Journal(run.runtime.home / ".servers" / "tracking" / "0")
    killed = Tracker(journal)
    killed.begin(RunStart("killed", {}, {}))
    run.start(killed, "train", range(1, 5))
    journal.close()
    with run.tracker() as tracker:  # first sends the events of the killed run
        run.start(tracker, "train", range(1, 9))  # resumed from a checkpoint, so early steps are written again
        run.finish(tracker, "train", {})
    mlflow = known(run)
    (stage,) = mlflow.runs("stage")
    # By status, not by order: both may have started in the same millisecond.
    pipelines = {pipeline.info.status: pipeline.info.run_id for pipeline in mlflow.runs("pipeline")}
    assert sorted(pipelines) == ["FINISHED", "KILLED"]
    assert stage.info.status == "FINISHED"
    assert stage.data.tags["mlflow.parentRunId"] == pipelines["FINISHED"]
    assert mlflow.steps(stage) == list(range(1, 9))
    assert journals(run) == []


def test_a_run_known_from_another_store_is_begun_anew(run: Run) -> None:
    StageRun("0" * 32).write(run.runtime.home / ".servers" / "runs", key("train"))
    with run.tracker() as tracker:
        run.start(tracker, "train", range(1, 5))
        run.finish(tracker, "train", {})
    (stage,) = known(run).runs("stage")
    assert stage.info.status == "FINISHED"


def test_what_mlflow_refuses_for_good_does_not_keep_later_runs_from_it(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    refused = Journal(run.runtime.home / ".servers" / "tracking" / "0")
    refused.append("pipeline_started", name="x", tags={}, settings={}, identity="x")
    refused.run_id = "0" * 32
    refused.save()
    refused.close()
    with run.tracker():
        pass
    assert [pipeline.info.status for pipeline in known(run).runs("pipeline")] == ["FINISHED"]
    assert "MLflow does not accept" in caplog.text
    assert [path.name for path in journals(run)] == ["0"]


def test_what_failed_half_way_is_sent_again_and_is_the_same(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.tracking.mlflow_view import MlflowView

    log_pictures = MlflowView._log_pictures
    parents = []

    def fail_once(self: MlflowView, run_id: str, path: Path) -> None:
        if self._client.get_run(run_id).data.tags["kind"] == "pipeline":
            parents.append(run_id)
            if len(parents) == 1:
                raise ConnectionError("gone for a moment")
        log_pictures(self, run_id, path)

    monkeypatch.setattr(MlflowView, "_log_pictures", fail_once)
    monkeypatch.setattr(sender, "_FIRST_PAUSE_S", 0.01)
    with run.tracker() as tracker:
        run.start(tracker, "train", range(1, 5))
        run.finish(tracker, "train", {}, heldout_loss=2.0)
    assert len(parents) == 2
    (pipeline,), (stage,) = known(run).runs("pipeline"), known(run).runs("stage")
    assert pipeline.inputs.dataset_inputs == []  # it was made, not reused
    assert known(run).steps(stage) == [1, 2, 3, 4]
    assert known(run).steps(stage, "heldout_loss") == [4]


def test_a_stopped_run_is_told_from_a_failed_one(run: Run) -> None:
    def stopped() -> None:
        with run.tracker() as tracker:
            run.start(tracker, "train", range(1, 5))
            tracker.stage_failed("train", KeyboardInterrupt())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    mlflow = known(run)
    assert [each.info.status for each in mlflow.runs("pipeline") + mlflow.runs("stage")] == ["KILLED", "KILLED"]


def test_a_full_disk_costs_the_view_and_not_the_stage(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Journal, kind: str, **fields: Any) -> None:
        raise OSError("No space left on device")

    with run.tracker() as tracker:
        monkeypatch.setattr(Journal, "append", full)
        run.start(tracker, "train", range(1, 5))
        run.finish(tracker, "train", {})
    assert known(run).runs("stage") == []


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RuntimeConfig, list[Service]]]:
    """Runtime settings with an MLflow server, and the list of started servers, which are stopped at the end."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", AUTH.partition(":")[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", AUTH.partition(":")[2])
    port = free_port()
    started: list[Service] = []
    yield RuntimeConfig(home=home, tracking_uri=f"http://{HOST}:{port}", mlflow_port=port), started
    for service in started:
        service.end()


def start_server(runtime: RuntimeConfig, started: list[Service]) -> None:
    started.append(servers.start_mlflow(RuntimeConfig(home=runtime.home), runtime.mlflow_port, AUTH))
    wait_until(started[-1], lambda: answers(runtime.mlflow_port, "/health"), 120)


@pytest.mark.timeout(600)
def test_a_server_killed_in_the_middle_costs_nothing_and_sync_repairs_it(
    server: tuple[RuntimeConfig, list[Service]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, started = server
    monkeypatch.setattr(sender, "PERIOD_S", 0.1)
    start_server(runtime, started)
    run = Run(runtime)
    with run.tracker() as tracker:
        run.start(tracker, "train", range(1, 5))
        mlflow = Known(servers.mlflow_uri(runtime))
        while not (mlflow.client.get_experiment_by_name("dpar") and mlflow.runs("stage")):
            pass  # until the stage is known there
        started.pop().end()
        run.start(tracker, "train", range(1, 9))
        run.finish(tracker, "train", {}, heldout_loss=2.0)
    assert "send the rest with `dpar mlflow sync`" in caplog.text
    wait_for(lambda: not any(thread.name == "MLflow-sender" for thread in threading.enumerate()))  # has the journal
    with pytest.raises(
        InputError,
        match=rf"MLflow \(http://{HOST}:{runtime.mlflow_port}\) does not accept the runs in .*tracking: ",
    ):
        sync(runtime)
    start_server(runtime, started)
    assert sync(runtime) == 1
    (pipeline,), (stage,) = mlflow.runs("pipeline"), mlflow.runs("stage")
    assert pipeline.info.status == stage.info.status == "FINISHED"
    assert pipeline.data.metrics == {"train.heldout_loss": 2.0}
    assert mlflow.steps(stage) == list(range(1, 9))
    assert sync(runtime) == 0


def test_an_experiment_deleted_on_the_page_is_restored_and_has_the_whole_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sender, "PERIOD_S", 0.1)
    mlflow = known(run)

    def delete() -> None:
        experiment = mlflow.client.get_experiment_by_name("dpar")
        assert experiment is not None
        mlflow.client.delete_experiment(experiment.experiment_id)

    with run.tracker("first"):
        pass
    delete()
    with run.tracker("second") as tracker:
        run.start(tracker, "train", range(1, 5))
        wait_for(lambda: mlflow.client.get_experiment_by_name("dpar") and mlflow.runs("stage"))
        delete()
        run.finish(tracker, "train", {})
    (stage,) = mlflow.runs("stage")
    assert mlflow.steps(stage) == [1, 2, 3, 4]
    assert [pipeline.info.status for pipeline in mlflow.runs("pipeline")] == ["FINISHED", "FINISHED"]
    assert journals(run) == []
    assert "MLflow's experiment dpar was deleted: it is restored, with its runs" in caplog.messages


def test_a_run_deleted_with_its_database_is_sent_whole_to_the_new_one(run: Run, empty_store: Path) -> None:
    left = Journal(run.runtime.home / ".servers" / "tracking" / "0")
    tracker = Tracker(left)
    tracker.begin(RunStart("left", {}, {}))
    run.start(tracker, "train", range(1, 3))
    left.sent, left.run_id, left.store = 1, "0" * 32, servers.mlflow_uri(run.runtime)
    left.save()
    left.close()
    with run.tracker("next"):
        pass
    assert {each.info.run_name: each.info.status for each in known(run).runs("pipeline")} == {
        "left": "KILLED",
        "next": "FINISHED",
    }
    assert journals(run) == []


@pytest.mark.parametrize("damage", ["head", "tail"])
def test_a_damaged_database_is_named_in_one_line_and_left_alone(
    run: Run, caplog: pytest.LogCaptureFixture, empty_store: Path, damage: str
) -> None:
    database = run.runtime.home / ".servers" / "mlflow.db"
    whole = database.read_bytes()
    database.write_bytes(b"damaged!" * 1000 if damage == "head" else whole[:5000])
    before, start = database.read_bytes(), time.monotonic()
    with run.tracker():
        wait_for(lambda: caplog.messages)
    assert time.monotonic() - start < 15
    assert f"does not answer: {database} is damaged (" in caplog.messages[0]
    assert database.read_bytes() == before
    database.write_bytes(whole)
    assert sync(run.runtime) == 1
    assert [pipeline.info.status for pipeline in known(run).runs("pipeline")] == ["FINISHED"]


def test_a_locked_database_gets_the_run_when_it_is_free(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "PAUSE_S", 0.2)
    with closing(sqlite3.connect(run.runtime.home / ".servers" / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with run.tracker():
            wait_for(lambda: "database is locked" in caplog.text)
            other.execute("ROLLBACK")
    assert [pipeline.info.status for pipeline in known(run).runs("pipeline")] == ["FINISHED"]


def test_an_old_schema_is_said_with_its_remedy(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "PATIENCE_S", 1.0)
    with closing(sqlite3.connect(run.runtime.home / ".servers" / "mlflow.db", isolation_level=None)) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    with run.tracker():
        pass
    assert "out-of-date database schema" in caplog.text
    assert "mlflow db upgrade" in caplog.text


def test_a_database_that_a_kill_left_half_made_is_made_anew(run: Run) -> None:
    folder = run.runtime.home / ".servers"
    (folder / "mlflow.db").unlink()
    program = (
        "from pathlib import Path\nfrom pipeline.tracking.mlflow_view import create_database\n"
        f"create_database(Path({str(folder / 'mlflow.db')!r}))\n"
    )
    half = folder / ".mlflow.db.partial"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        wait_for(lambda: half.exists() and half.stat().st_size > 0)
        process.send_signal(signal.SIGKILL)
    assert not (folder / "mlflow.db").exists()
    with run.tracker():
        pass
    assert [pipeline.info.status for pipeline in known(run).runs("pipeline")] == ["FINISHED"]
    assert not half.exists()


def test_a_server_that_accepts_and_never_answers_costs_seconds_and_is_said(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "PATIENCE_S", 2.0)
    with socket.create_server((HOST, 0)) as silent:
        uri = f"http://{HOST}:{silent.getsockname()[1]}"
        run = Run(RuntimeConfig(home=home, tracking_uri=uri))
        start = time.monotonic()
        with run.tracker() as tracker:
            run.start(tracker, "train", range(1, 5))
            assert time.monotonic() - start < 1
            run.finish(tracker, "train", {})
            assert time.monotonic() - start < 1
        assert time.monotonic() - start < 10
    assert f"MLflow ({uri}) did not receive all events of this run" in caplog.messages[-1]
    assert len(journals(run)) == 1


def test_damaged_notes_of_an_earlier_attempt_cost_nothing(run: Run) -> None:
    runs = run.runtime.home / ".servers" / "runs"
    runs.mkdir()
    (runs / f"{key('train')}.json").write_text("{")
    with run.tracker() as tracker:
        work = run.start(tracker, "train", range(1, 3))
        with (work / "record" / "metrics.jsonl").open("a") as metrics:
            metrics.write('{"step": 3, "loss": \n7\n{"loss": 1}\n{"step": 4, "loss": 0.25}\n')
        run.finish(tracker, "train", {})
    (stage,) = known(run).runs("stage")
    assert known(run).steps(stage) == [1, 2, 4]
