"""Cause of a failed process as one line: the signal that ended it, its error file, or its last line of output."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from pipeline.launchers.commands import Process
from stages.runtime.artifact import read_json
from stages.runtime.job import ERROR_FILE

_TAIL_BYTES = 64 * 1024
_TORCHRUN_REPORT = re.compile(r"^E\d{4} .*failed \(exitcode: (-?\d+)\)", re.MULTILINE)
_REPORTS = re.compile(r"[WEI]\d{4} .*torch/distributed/|srun: |slurmstepd-?\S*: ")  # lines of torchrun and of Slurm


class StageFailed(RuntimeError):
    """A stage's process failed. `code` is 2 for a user error, else 1; `kind` is the class name of the error."""

    def __init__(self, stage: str, message: str, code: int, log: Path, kind: str = "") -> None:
        super().__init__(f"stage {stage} failed: {message} (log: {log})")
        self.stage, self.message, self.code, self.log, self.kind = stage, message, code, log, kind


def failure(process: Process, returncode: int, log_start: int) -> StageFailed:
    """Cause of a failure.

    Args:
        process: The failed process.
        returncode: Its exit code, below zero for a signal.
        log_start: Size of the log when it started; the log may hold the output of an earlier attempt.
    """
    said, code = _last_words(process.log, log_start, returncode)
    if code < 0:  # checked before the error file: the other workers only report that this one is gone
        ended_by = signal.Signals(-code).name
        hint = ", possibly out of memory: lower the stage's batch size" if ended_by == "SIGKILL" else ""
        return StageFailed(process.name, f"its process was ended by {ended_by}{hint}", 1, process.log)
    try:
        error = read_json(process.job.output / ERROR_FILE)
        return StageFailed(process.name, error["message"], error["code"], process.log, error["kind"])
    except (OSError, ValueError, KeyError):
        last = f"exit code {code}, last line: {said or 'no output'}"
        return StageFailed(process.name, last, 1, process.log)


def last_line(log: Path, start: int) -> str:
    """Last line of output from `start` on, bytes, that is neither torchrun's nor Slurm's."""
    return _last_words(log, start, 0)[0]


def _last_words(log: Path, start: int, returncode: int) -> tuple[str, int]:
    """Last line of output and exit code of a process; those of the first failed worker if torchrun reports one.

    On several machines each torchrun reports its own worker. A worker that a signal ended is the cause of the others'
    errors, unless torchrun itself sent the SIGTERM.
    """
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    reports = list(_TORCHRUN_REPORT.finditer(text))
    if reports:
        ended = [report for report in reports if int(report[1]) < 0 and int(report[1]) != -signal.SIGTERM]
        report = (ended or reports)[0]
        text, returncode = text[: report.start()], int(report[1])
    lines = [line.strip() for line in text.splitlines() if line.strip() and not _REPORTS.match(line)]
    return (lines[-1] if lines else ""), returncode
