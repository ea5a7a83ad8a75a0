"""Stages as jobs of a real Slurm: results, failures, cancellation, and a launcher that comes and goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from slurm_cluster import NODES, Cluster
from waiting import wait_for

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.section import Section
from pipeline.garbage import find_garbage
from pipeline.graph import STAGES, inputs_read
from pipeline.launch import StageFailed, launch
from pipeline.launchers import sbatch
from pipeline.project import DPAR
from pipeline.runner import run_stage
from stages.runtime.errors import InputError
from stages.runtime.job import Job
from stages.stores.samples import SampleStore
from stages.stores.tokens import TokenStore

pytestmark = pytest.mark.slow

ATTEMPT = "Slurm job "  # first words of the log of every attempt


def start(tiny: Any) -> tuple[subprocess.Popen[str], Path]:
    """Run `alpha` from another process, and wait until its job works. Returns the process and the work folder."""
    tiny.gate("alpha")
    launcher = tiny.start("alpha")
    wait_for(lambda: list(tiny.home.glob(".work/*/record/steps")), 30)
    (steps,) = tiny.home.glob(".work/*/record/steps")
    return launcher, steps.parent.parent


def open_gate(tiny: Any) -> None:
    (tiny.home / "gate-alpha").unlink()


def attempts(folder: Path) -> int:
    return (folder / "record/log.txt").read_text().count(ATTEMPT)


def attach_and_finish(tiny: Any, number: int) -> None:
    """Run `alpha` again while its job works: the run attaches to the job, which makes it in one attempt."""
    second = tiny.start("alpha")
    assert second.stderr.readline().startswith(f"attached to Slurm job {number}, which is making alpha-")
    open_gate(tiny)
    assert second.communicate()[0].strip() == "ran"
    assert attempts(tiny.run("alpha").path) == 1


def test_a_job_makes_the_artifact_and_leaves_its_script(jobs: Any) -> None:
    result = jobs.run("alpha")
    assert (result.state, json.loads((result.path / "number.json").read_text())) == ("ran", 2)
    record = {path.name for path in (result.path / "record").iterdir()}
    assert record == {"log.txt", "slurm.sbatch"}
    assert attempts(result.path) == 1
    assert jobs.run("alpha").state == "cached"


def test_a_killed_launcher_costs_nothing_and_the_next_one_attaches(jobs: Any, cluster: Cluster) -> None:
    launcher, work = start(jobs)
    launcher.kill()
    launcher.communicate()
    (number,) = cluster.jobs()
    with pytest.raises(InputError, match=rf"Slurm job {number} may still be making {work.name}: run with"):
        run_stage(
            jobs.module.GRAPH["alpha"],
            jobs.settings(),
            RuntimeConfig(home=jobs.home, launcher="local"),
            project=jobs.project,
        )
    garbage = find_garbage(jobs.settings(), jobs.runtime, {}, older_than_s=-60, project=jobs.project).garbage
    assert [entry.path for entry in garbage] == []
    attach_and_finish(jobs, number)


def test_a_job_that_ended_while_nobody_looked_is_committed(jobs: Any, cluster: Cluster) -> None:
    launcher, _ = start(jobs)
    launcher.kill()
    launcher.communicate()
    open_gate(jobs)
    wait_for(lambda: not cluster.jobs(), 30)
    result = jobs.run("alpha")
    assert (result.state, attempts(result.path)) == ("ran", 1)


def test_a_job_is_found_by_its_name_if_its_number_was_never_written(jobs: Any, cluster: Cluster) -> None:
    launcher, work = start(jobs)
    launcher.kill()
    launcher.communicate()
    (number,) = cluster.jobs()
    (work / "record/slurm.json").unlink()
    attach_and_finish(jobs, number)


def test_ctrl_c_cancels_the_job_and_a_rerun_goes_on(jobs: Any, cluster: Cluster) -> None:
    launcher, work = start(jobs)
    os.kill(launcher.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in launcher.communicate()[1]
    assert cluster.jobs() == []
    assert not (work / "record/slurm.json").exists()
    done = (work / "record/steps").stat().st_size
    open_gate(jobs)
    result = jobs.run("alpha")
    assert (attempts(result.path), (result.path / "record/steps").stat().st_size) == (2, done)


def test_a_job_cancelled_by_others_is_named(jobs: Any, cluster: Cluster) -> None:
    launcher, _ = start(jobs)
    (number,) = cluster.jobs()
    cluster.call("scancel", str(number))
    assert f"stage alpha failed: Slurm job {number}: it was cancelled; run again" in launcher.communicate()[1]


@pytest.mark.parametrize("how", ["requeue", "limit"])
def test_a_job_put_back_into_the_queue_goes_on(jobs: Any, cluster: Cluster, how: str) -> None:
    launcher, _ = start(jobs)
    (number,) = cluster.jobs()
    if how == "requeue":  # as after a preemption, or the failure of a node
        cluster.call("scontrol", "requeue", str(number))
    else:  # what Slurm sends to the script before the time limit
        cluster.call("scancel", "--batch", "--signal=USR1", str(number))
    cluster.start_again(number)
    open_gate(jobs)
    assert launcher.communicate()[0].strip() == "ran"
    assert attempts(jobs.run("alpha").path) == 2


def test_a_stage_that_saves_nothing_is_not_started_again_and_again(jobs: Any, cluster: Cluster) -> None:
    jobs.edit("alpha", 'steps.open("a").write("x")', "print('working', flush=True)")
    jobs.gate("alpha")
    launcher = jobs.start("alpha")
    wait_for(lambda: any("working" in log.read_text() for log in jobs.home.glob(".work/*/record/log.txt")), 30)
    cluster.call("scancel", "--batch", "--signal=USR1", str(cluster.jobs()[0]))
    message = "exit code 143, last line: nothing was saved before the time limit: set runtime.slurm.hours higher"
    assert message in launcher.communicate()[1]


def test_an_error_of_the_stage_is_one_line(jobs: Any) -> None:
    jobs.home.mkdir()
    (jobs.home / "fail-alpha").touch()
    with pytest.raises(StageFailed, match=r"stage alpha failed: the test asked for it") as caught:
        jobs.run("alpha")
    assert caught.value.code == 2
    (jobs.home / "fail-alpha").unlink()
    assert jobs.run("alpha").state == "ran"


def test_what_slurm_refuses_is_one_line(jobs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPAR_SLURM__PARTITION", "nowhere")
    with pytest.raises(InputError, match=r"sbatch refused the job of alpha: .*invalid partition specified: nowhere"):
        jobs.run("alpha")


@pytest.mark.parametrize(
    ("blind", "message"),
    [
        (
            0,
            "ended as FAILED without a line of output: its first node cannot write to .*: set runtime.home to a folder",
        ),
        (1, rf"node {NODES[1]} does not see the files in .*: set runtime.home to a folder that all nodes share"),
    ],
)
def test_a_node_without_the_shared_home_is_named_before_the_first_step(
    jobs: Any, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, blind: int, message: str
) -> None:
    monkeypatch.setenv("DPAR_NODES", "2")
    monkeypatch.setattr(sbatch, "_PROBE", sbatch._PROBE.replace("sleep 1", "sleep 0.1"))
    jobs.gate("alpha")
    cluster.stop_node(NODES[blind])
    cluster.start_node(NODES[blind], without=jobs.home)
    try:
        with pytest.raises(StageFailed, match=message) as caught:
            jobs.run("alpha")
    finally:
        cluster.stop_node(NODES[blind])
        cluster.start_node(NODES[blind])
    assert caught.value.code == 2
    assert not list(jobs.home.glob(".work/*/record/steps"))


def test_a_node_whose_daemon_restarts_keeps_its_job(jobs: Any, cluster: Cluster) -> None:
    launcher, _ = start(jobs)
    for node in NODES:
        cluster.stop_node(node, signal.SIGKILL)
    for node in NODES:
        cluster.start_daemon(node)
    open_gate(jobs)
    assert launcher.communicate()[0].strip() == "ran"
    assert attempts(jobs.run("alpha").path) == 1


def test_a_job_goes_on_after_the_loss_of_its_node(jobs: Any, cluster: Cluster) -> None:
    launcher, _ = start(jobs)
    (number,) = cluster.jobs()
    lost = cluster.node_of(number)
    cluster.lose_node(lost, number)
    cluster.start_again(number)
    cluster.start_daemon(lost)
    open_gate(jobs)
    assert launcher.communicate()[0].strip() == "ran"
    assert attempts(jobs.run("alpha").path) == 2


@pytest.mark.parametrize(("who", "ranks"), [("rank", 4), ("agent", 2)])
def test_a_killed_process_ends_all_and_is_named(
    jobs: Any, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, who: str, ranks: int
) -> None:
    monkeypatch.setenv("DPAR_NODES", "2")
    monkeypatch.setenv("DPAR_PROCESSES", str(ranks // 2))
    launcher, _ = start(jobs)
    wait_for(lambda: len(processes_of(jobs, "stages.alpha")) == ranks + 2, 60)  # and two agents
    workers = [each for each in processes_of(jobs, "stages.alpha") if "torch.distributed.run" not in each.cmdline()]
    victim = workers[-1] if who == "rank" else workers[-1].parent()
    assert victim is not None
    victim.kill()
    _, errors = launcher.communicate()
    assert "ended by SIGKILL, possibly out of memory" in errors, errors
    wait_for(lambda: not processes_of(jobs, "stages.alpha"), 30)
    open_gate(jobs)
    monkeypatch.setenv("DPAR_NODES", "1")  # the other nodes need not come back
    monkeypatch.setenv("DPAR_PROCESSES", "1")
    assert jobs.run("alpha").state == "ran"


def processes_of(tiny: Any, module: str) -> list[psutil.Process]:
    """Processes of the small project's job that run a module."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        own = any(str(tiny.home) in word for word in words) and module in words and words[0].endswith("python")
        if own and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


Stages = Callable[..., Path]


@pytest.fixture
def on_two_nodes(
    cluster: Cluster, tmp_path: Path, image_root: Path, tiny_settings: Settings, tiny_artifacts: dict[str, Path]
) -> Stages:
    """Run a stage of the tiny preset as two ranks on each of two nodes, on the artifacts of one process."""
    runtime = RuntimeConfig(home=tmp_path, launcher="slurm", nodes=2, processes=2)

    def run(name: str, config: Section, on_progress: Callable[[Any], Any] = id) -> Path:
        stage = STAGES[name]
        inputs = {source: tiny_artifacts[source] for source in inputs_read(stage, tiny_settings)}
        job = Job(
            stage=name,
            config=config.model_dump(mode="json"),
            inputs=inputs | ({"images": image_root} if stage.reads_images else {}),
            output=tmp_path / name,
            runtime=runtime.model_dump(mode="json"),
        )
        entry = stage.entry[0]
        launch(name, entry, job, runtime, code_root=DPAR.code_root, locks=(), spmd=True, on_progress=on_progress)
        return job.output

    return run


@pytest.mark.timeout(600)
def test_two_nodes_make_the_tokens_and_samples_of_one_process(
    on_two_nodes: Stages, tiny_settings: Settings, tiny_artifacts: dict[str, Path]
) -> None:
    tokens = TokenStore.open(on_two_nodes("tokenize", tiny_settings.tokenize) / "tokens.zarr")
    assert tokens.digest == TokenStore.of(tiny_artifacts).digest
    output = on_two_nodes("sample", tiny_settings.sample)
    four, one = (SampleStore.open(path / "samples.zarr") for path in (output, tiny_artifacts["sample"]))
    assert np.array_equal(four.tokens, one.tokens)
    assert np.array_equal(four.labels, one.labels)


@pytest.mark.timeout(600)
def test_training_on_two_nodes_saves_near_the_time_limit_and_goes_on(
    on_two_nodes: Stages,
    cluster: Cluster,
    tiny_settings: Settings,
    tiny_artifacts: dict[str, Path],
    run_in_process: Any,
    without_shape_checks: None,
) -> None:
    training = tiny_settings.train.training.model_copy(update={"steps": 32})
    # Without dropout nothing is random but the order of samples, which does not depend on the processes.
    config = tiny_settings.train.model_copy(update={"dropout": 0.0, "class_dropout_prob": 0.0, "training": training})
    warned: list[int] = []

    def warn_once(progress: dict[str, Any]) -> None:
        """Send what Slurm sends to the script before the time limit."""
        if not warned and training.checkpoint_every < progress["done"] < training.steps:
            warned.extend(cluster.jobs())
            cluster.call("scancel", "--batch", "--signal=USR1", str(warned[0]))
            cluster.start_again(warned[0])

    output = on_two_nodes("train", config, warn_once)
    assert warned
    assert attempts(output) == 2
    assert "resuming from step" in (output / "record/log.txt").read_text()
    interrupted, whole = (last_metrics(path) for path in (output, run_in_process("train", config, tiny_artifacts)))
    assert interrupted["step"] == whole["step"] == training.steps
    assert interrupted["heldout_loss"] == pytest.approx(whole["heldout_loss"], rel=1e-3)


def last_metrics(artifact: Path) -> dict[str, float]:
    lines = (artifact / "record/metrics.jsonl").read_text().splitlines()
    return [metrics for line in lines if "heldout_loss" in (metrics := json.loads(line))][-1]
