"""A sampling job that is killed, and goes on with any number of processes, leaves the bytes of an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.graph import STAGES, inputs_read
from pipeline.launch import launch
from pipeline.project import DPAR
from stages.runtime.job import Job
from stages.sample import sample

pytestmark = pytest.mark.slow

UNITS = 6


def content(output: Path) -> dict[str, bytes]:
    """All files but the record."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and "record" not in path.relative_to(output).parts
    }


def units(output: Path) -> dict[str, int]:
    """When each finished unit was written."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "record/units").glob("*.json")}


@pytest.mark.usefixtures("without_shape_checks")
def test_a_killed_job_goes_on_to_the_same_bytes(
    tiny_settings: Settings, tiny_artifacts: dict[str, Path], tmp_path: Path
) -> None:
    config = tiny_settings.sample.model_copy(update={"num_samples": 4 * UNITS - 1})
    inputs = {name: tiny_artifacts[name] for name in inputs_read(STAGES["sample"], tiny_settings)}
    runtime = RuntimeConfig(home=tmp_path, device="cpu", threads=1, processes=2)
    job = Job(
        stage="sample",
        config=config.model_dump(mode="json"),
        inputs=inputs,
        output=tmp_path / "killed",
        runtime=runtime.model_dump(mode="json"),
    )
    job.write(tmp_path / "job.json")
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.sample", "--job", str(tmp_path / "job.json")],
        env=os.environ | {"PYTHONPATH": str(DPAR.code_root)},
        stdout=subprocess.DEVNULL,
    )
    while len(units(job.output)) < 2:
        assert process.poll() is None, "it must be killed before its end"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(units(job.output)) < UNITS
    on_one, on_two = (shutil.copytree(job.output, tmp_path / f"killed-{number}") for number in (1, 2))
    finished = units(job.output)

    sample(config, inputs, on_one, runtime)
    lock = os.open(tmp_path / "lock", os.O_CREAT)
    job = replace(job, output=on_two)
    launch("sample", "stages.sample", job, runtime, code_root=DPAR.code_root, locks=(lock,), spmd=True)
    os.close(lock)
    sample(config, inputs, tmp_path / "undisturbed", runtime)
    undisturbed = content(tmp_path / "undisturbed")
    assert {"boundaries.json", "samples.zarr/zarr.json"} < set(undisturbed)
    for output in (on_one, on_two):
        assert content(output) == undisturbed
        assert finished.items() <= units(output).items(), "finished units are not drawn again"
