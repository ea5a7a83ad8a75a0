"""Which of several reports is the cause of a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.launchers.commands import Process
from pipeline.launchers.failure import failure, last_line
from stages.runtime.artifact import write_json
from stages.runtime.job import ERROR_FILE, Job

REPORT = "E1126 07:00:00.0 12 site-packages/torch/distributed/elastic/api.py:9] failed (exitcode: {}) local_rank: 0"


@pytest.fixture
def process(tmp_path: Path) -> Process:
    (tmp_path / "record").mkdir()
    job = Job(stage="train", config={}, inputs={}, output=tmp_path, runtime={})
    return Process(name="train", module="stages.train", job=job, code_root=tmp_path)


def message(process: Process, *lines: str, returncode: int = 1) -> str:
    process.log.write_text("\n".join(("an earlier attempt", *lines)) + "\n")
    return failure(process, returncode, len("an earlier attempt")).message


@pytest.mark.parametrize("codes", [(1, -9), (-9, 1), (-15, -9), (-9, -15)])
def test_a_killed_worker_of_any_machine_is_the_cause(process: Process, codes: tuple[int, ...]) -> None:
    reports = [REPORT.format(code) for code in codes]
    assert message(process, "RuntimeError: Connection closed by peer", *reports).startswith(
        "its process was ended by SIG"
    )
    assert "SIGKILL" in message(process, *reports)


def test_an_error_file_wins_over_the_exit_codes_that_follow_from_it(process: Process) -> None:
    write_json(process.job.output / ERROR_FILE, {"message": "no weights", "kind": "InputError", "code": 2, "rank": 3})
    assert message(process, REPORT.format(2), REPORT.format(-15)) == "no weights"


def test_lines_of_torchrun_and_of_slurm_are_no_last_words(process: Process) -> None:
    noise = (
        "srun: error: n1: task 0: Exited with exit code 7",
        "slurmstepd-n1: error: *** STEP 1.0 ON n1 CANCELLED ***",
        "slurmstepd: error: *** JOB 1 ***",
    )
    assert message(process, "the last words", *noise, returncode=7) == "exit code 7, last line: the last words"
    assert last_line(process.log, 0) == "the last words"


def test_only_what_this_attempt_said_counts(process: Process) -> None:
    assert message(process, returncode=3) == "exit code 3, last line: no output"
