"""A sampling job that is killed, and goes on with any number of processes, leaves the bytes of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_job_goes_on_to_the_same_bytes(
    tiny_settings: Settings, tiny_artifacts: dict[str, Path], tmp_path: Path, processes: int
) -> None:
    config = tiny_settings.sample.model_copy(update={"num_samples": 4 * UNITS - 1})
    inputs = {name: tiny_artifacts[name] for name in inputs_read(STAGES["sample"], tiny_settings)}
    runtime = RuntimeConfig(home=tmp_path, device="cpu", threads=1, processes=processes)
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
    units = job.output / "record" / "units"
    while len(list(units.glob("*.json"))) < 2:
        assert process.poll() is None, "it must be killed before its end"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in units.glob("*.json")}
    assert 2 <= len(finished) < UNITS

    lock = os.open(tmp_path / "lock", os.O_CREAT)
    launch("sample", "stages.sample", job, runtime, code_root=DPAR.code_root, locks=(lock,), spmd=True)
    os.close(lock)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished units are not drawn again"
    sample(config, inputs, tmp_path / "undisturbed", runtime)
    assert content(job.output) == content(tmp_path / "undisturbed")
    assert {"boundaries.json", "samples.zarr/zarr.json"} < set(content(job.output))
