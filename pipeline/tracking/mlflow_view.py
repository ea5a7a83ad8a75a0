"""Writes the events of a journal to MLflow. Beside it only `mlflow_app.py` imports MLflow.

Each pipeline run is one MLflow run with all settings as params and all final numbers as metrics, so that ablations can
be compared. Below it is a nested run for each stage that ran. A cached stage is tagged with the run that made it.
Stores and weights are referenced by path and digest and never copied.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# The sender tries again, and says what fails. MLflow reads these variables at each request.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from pipeline.cache import repository
from pipeline.cache.differences import flat
from pipeline.cache.manifest import MANIFEST
from pipeline.cache.store import Cache
from pipeline.report import collect
from pipeline.servers import exempt_loopback, locked, store_lock
from pipeline.servers.databases import sqlite_address
from pipeline.tracking.journal import Event, Journal, JournalError, require_valid
from pipeline.tracking.metric_tail import MetricTail, Point, StageRun
from pipeline.views import VIEWS

logger = logging.getLogger(__name__)
exempt_loopback()  # MLflow's client reads the proxies in the environment
EXPERIMENT = "dpar"
_BATCH, _PARAMS = 1000, 100  # metrics and params that MLflow accepts per request
_LONGEST = 6000  # characters of a param's value
_DIGEST = 36  # characters of a dataset's digest


class MlflowView:
    """Writes journals to an MLflow store.

    Args:
        uri: URI of the store.
        folder: home/.servers: pictures of a local store, and the files that map keys to runs.
    """

    def __init__(self, uri: str, folder: Path) -> None:
        self._uri = uri
        self._cache = Cache(folder.parent)
        self._runs = folder / "runs"
        self._tails: dict[str, MetricTail] = {}
        folder.mkdir(parents=True, exist_ok=True)
        with locked(store_lock(folder)):  # two first runs would both create the store and the experiment
            self._client = MlflowClient(tracking_uri=uri)
            self._experiment = self._open_experiment(folder)

    def _open_experiment(self, folder: Path) -> str:
        """ID of the experiment. If it was deleted on the page, it is restored, with its runs."""
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            # A server chooses its own location for pictures.
            pictures = None if self._uri.startswith("http") else (folder / "mlartifacts").as_uri()
            return self._client.create_experiment(EXPERIMENT, pictures)
        if found.lifecycle_stage == "deleted":
            self._restore(found.experiment_id)
        return found.experiment_id

    def ping(self) -> None:
        """Ask for the experiment. One that was deleted meanwhile is restored."""
        if self._client.get_experiment(self._experiment).lifecycle_stage == "deleted":
            self._restore(self._experiment)

    def _restore(self, experiment: str) -> None:
        self._client.restore_experiment(experiment)
        logger.warning("MLflow's experiment %s was deleted: it is restored, with its runs", EXPERIMENT)

    def send(self, journal: Journal, on_sent: Callable[[], None]) -> None:
        """Send the unsent events of a journal and new metrics of running stages. Failed events are sent next time.

        Raises:
            JournalError: The journal is damaged.
            Exception: Any error of MLflow, its database or the network.
        """
        unsent = journal.unsent()
        if unsent:
            self.ping()  # runs are deleted and restored with their experiment
        if unsent and journal.run_id is not None and not self._has(journal.run_id):
            if journal.store != self._uri:
                raise LookupError(f"its run {journal.run_id} is in {journal.store or 'another store'}")
            journal.restart()  # it has gone with its database, or was deleted on the page
            unsent = journal.unsent()
        for event in unsent:
            require_valid(event)
            self._apply(journal, event)
            journal.sent += 1
            journal.save()
            on_sent()
        for place in journal.running.values():
            self._follow(place["key"], Path(place["work"]))

    def _apply(self, journal: Journal, event: Event) -> None:
        """Apply one event. Each handler can be repeated after it failed half way."""
        match event["event"]:
            case "pipeline_started":
                self._pipeline_started(journal, event)
            case "stage_started":
                self._stage_started(journal, event)
            case "stage_finished":
                self._stage_finished(journal, event)
            case "stage_failed":
                self._stage_failed(journal, event)
            case "pipeline_finished":
                self._client.set_terminated(_parent(journal), event["status"], event["time_ms"])

    def _pipeline_started(self, journal: Journal, event: Event) -> None:
        if journal.run_id is None:
            tags = {**event["tags"], **_commit(), "kind": "pipeline", "mlflow.runName": event["name"]}
            tags["run"] = event["identity"]
            tags["settings.digest"] = hashlib.sha256(json.dumps(event["settings"]).encode()).hexdigest()[:20]
            run = self._client.create_run(self._experiment, start_time=event["time_ms"], tags=tags)
            journal.run_id, journal.store = run.info.run_id, self._uri
            journal.save()
        params = [Param(name, str(value)[:_LONGEST]) for name, value in flat(event["settings"]).items()]
        for start in range(0, len(params), _PARAMS):
            self._client.log_batch(journal.run_id, params=params[start : start + _PARAMS])
        self._client.log_dict(journal.run_id, event["settings"], "settings.yaml")

    def _stage_started(self, journal: Journal, event: Event) -> None:
        stage, key = event["stage"], event["key"]
        parent = _parent(journal)
        known = StageRun.read(self._runs, key)
        if (
            known is not None and known.open and self._has(known.run_id)
        ):  # continue the run of a killed attempt at this key
            self._client.update_run(known.run_id, status="RUNNING")
            self._client.set_tag(known.run_id, "mlflow.parentRunId", parent)
        else:
            tags = {"kind": "stage", "stage": stage, "stage.key": key, "mlflow.runName": stage}
            tags["mlflow.parentRunId"] = parent
            run = self._client.create_run(self._experiment, start_time=event["time_ms"], tags=tags)
            StageRun(run.info.run_id).write(self._runs, key)
        journal.running[stage] = {"key": key, "work": event["work"]}

    def _has(self, run_id: str) -> bool:
        """Whether this store has the run. It may belong to another store, or may have been deleted on the page."""
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _stage_finished(self, journal: Journal, event: Event) -> None:
        stage, key, path = event["stage"], event["key"], Path(event["path"])
        parent = _parent(journal)
        known = self._follow(key, path) if stage in journal.running else StageRun.read(self._runs, key)
        if stage in journal.running and known is not None:
            self._finish_stage(known, event, path)
            known.open = False
            known.write(self._runs, key)
        else:
            self._client.log_inputs(parent, [_dataset(stage, event["digest"], path, "reused")])
        tags = {"key": key, "state": event["state"], "run_id": known.run_id if known else "unknown"}
        prefix = "" if stage == "evaluate" else f"{stage}."
        final = [Point(prefix + name, 0, value) for name, value in event["metrics"].items()]
        self._client.log_batch(
            parent,
            metrics=_metrics(final, event["time_ms"]),
            tags=[RunTag(f"stage.{stage}.{name}", value) for name, value in tags.items()],
        )
        self._log_pictures(parent, path)
        if stage == "evaluate" and path.exists():
            self._client.log_text(parent, _score_table(path), "scores.md")
        journal.running.pop(stage, None)

    def _finish_stage(self, known: StageRun, event: Event, path: Path) -> None:
        run_id = known.run_id
        tags = {"artifact.digest": event["digest"], "artifact.uri": path.as_uri()}
        last = max(known.steps.values(), default=0)  # final values end the metrics of the same names
        final = known.fresh(Point(name, last, value) for name, value in event["metrics"].items())
        self._client.log_batch(
            run_id, metrics=_metrics(final, event["time_ms"]), tags=[RunTag(*tag) for tag in tags.items()]
        )
        self._client.log_inputs(run_id, self._inputs(path))
        if (path / MANIFEST).exists():
            self._client.log_artifact(run_id, str(path / MANIFEST))
        self._log_pictures(run_id, path)
        self._client.set_terminated(run_id, "FINISHED", event["time_ms"])

    def _stage_failed(self, journal: Journal, event: Event) -> None:
        place = journal.running.get(event["stage"])
        known = self._follow(place["key"], Path(place["work"])) if place else None
        if known is not None:
            self._client.set_tag(known.run_id, "last_error", event["message"])
            self._client.set_terminated(known.run_id, event["status"], event["time_ms"])
        self._client.set_tag(_parent(journal), "last_error", event["message"])
        journal.running.pop(event["stage"], None)

    def _follow(self, key: str, folder: Path) -> StageRun | None:
        """Send new metrics of a stage; returns the stage's run."""
        known = StageRun.read(self._runs, key)
        if known is None:
            return None
        tail = self._tails.pop(key, None)
        if tail is None or tail.folder != folder:
            tail = MetricTail(folder)
        fresh = known.fresh(tail.points())
        for start in range(0, len(fresh), _BATCH):
            part = fresh[start : start + _BATCH]
            self._client.log_batch(known.run_id, metrics=_metrics(part, time.time_ns() // 1_000_000))
            known.add(part)
            known.write(self._runs, key)
        self._tails[key] = tail  # only after success; after a failure the file is read again
        return known

    def _inputs(self, path: Path) -> list[DatasetInput]:
        """Artifacts that an artifact was made from, by content digest."""
        manifest = self._cache.read(path)
        if manifest is None:
            return []
        return [
            _dataset(stage, digest, made, "input")
            for stage, digest in manifest.parts["inputs"].items()
            for made in [made for made, other in self._cache.manifests(stage) if other.digest == digest][:1]
        ]

    def _log_pictures(self, run_id: str, path: Path) -> None:
        for picture in sorted((path / VIEWS).glob("*.png")):
            self._client.log_artifact(run_id, str(picture))


def create_database(path: Path) -> None:
    """Create MLflow's SQLite file if it does not exist. A file with this name is whole: MLflow cannot complete half.

    Raises:
        Exception: Any error of MLflow or the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(store_lock(path.parent)):
        if not path.exists():
            partial = path.with_name(f".{path.name}.partial")
            partial.unlink(missing_ok=True)  # of a killed process
            MlflowClient(tracking_uri=sqlite_address(partial)).search_experiments(max_results=1)
            partial.rename(path)


def _metrics(points: Iterable[Point], time_ms: int) -> list[Metric]:
    return [Metric(point.name, float(point.value), time_ms, point.step) for point in points]


def _dataset(name: str, digest: str, path: Path, context: str) -> DatasetInput:
    """A reference to an artifact: MLflow shows name and digest and stores no copy."""
    source = json.dumps({"uri": path.as_uri()})
    return DatasetInput(Dataset(name, digest[:_DIGEST], "local", source), [InputTag("mlflow.data.context", context)])


def _score_table(path: Path) -> str:
    report = collect({"evaluate": path})
    lines = [f"| {score.name} | {score.value:.4g} | {score.meaning} |" for score in (*report.ladder, *report.scores)]
    return "\n".join(["| score | value | meaning |", "|---|---|---|", *lines, ""])


def _commit() -> dict[str, str]:
    """Tags for the commit of the code; empty outside a repository."""
    head = repository.head()
    return {} if head is None else {"mlflow.source.git.commit": head.commit, "git.dirty": str(head.dirty).lower()}


def _parent(journal: Journal) -> str:
    if journal.run_id is None:
        raise JournalError(f"{journal.folder} has no event pipeline_started before others, expected it first")
    return journal.run_id
