"""MLflow has the complete run, even if the server or the run was down or killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.load import load_settings
from conf.runtime import RuntimeConfig
from pipeline import servers
from pipeline.cache.manifest import Manifest, Parts, content_digest, key_of
from pipeline.cache.store import Cache
from pipeline.processes import HOST, Service, answers, free_port, wait_until
from pipeline.runner import StageResult
from pipeline.tracking import tracker as tracking
from pipeline.tracking.journal import Journal
from pipeline.tracking.metric_tail import StageRun
from pipeline.tracking.tracker import Tracker, sync
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

    def tracker(self, name: str = "tiny") -> Tracker:
        return Tracker(SETTINGS, self.runtime, name=name, tags={"preset": "tiny", "ablation": "none"})

    def start(self, tracker: Tracker, stage: str, steps: range) -> Path:
        """Start or resume a stage that has logged these steps."""
        work = self.cache.work(key(stage))
        tracker.stage_started(stage, key(stage), work)
        (work / "record").mkdir(parents=True, exist_ok=True)
        partial = work / "record" / "metrics.partial"
        partial.write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in steps))
        os.replace(partial, work / "record" / "metrics.jsonl")
        return work

    def finish(self, tracker: Tracker, stage: str, inputs: dict[str, str], **metrics: float) -> StageResult:
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
    killed = run.tracker()
    killed._journal.append("pipeline_started", name="killed", tags={}, settings={})
    run.start(killed, "train", range(1, 5))
    killed._journal.close()
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
    refused.append("pipeline_started", name="x", tags={}, settings={})
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
    monkeypatch.setattr(tracking, "_PAUSE_S", 0.0)
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
    monkeypatch.setattr(tracking, "_PERIOD_S", 0.1)
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
