"""A stage as a Slurm job: submit it or attach to it, follow it through shared files, cancel it.

record/slurm.sbatch   the batch script
record/slurm.json     number and name of the job, from its submission until a launcher has seen its end
record/slurm.exit     exit code of the batch script
record/slurm.probe    what every node must see before the first step

The job does not depend on the process that submitted it. If that dies, the next run finds the number of the job and
attaches to it. The lock of the artifact is held by the process alone, so the number also tells a run on another
machine, a local run and `dpar gc` that somebody is writing here. The cluster needs no accounting database.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from conf.runtime import RuntimeConfig
from pipeline.launchers.commands import Process
from pipeline.launchers.failure import StageFailed, failure, last_line
from pipeline.launchers.progress import OnProgress, ProgressFile
from pipeline.launchers.sbatch import BLIND, script
from stages.runtime.artifact import read_json, write_atomic, write_json
from stages.runtime.errors import InputError

logger = logging.getLogger(__name__)
JOB, SCRIPT, EXIT, PROBE = "slurm.json", "slurm.sbatch", "slurm.exit", "slurm.probe"
POLL_S = 1.0  # between looks at the shared files
ASK_S = 20.0  # between questions to Slurm's controller, which many users ask
CANCEL_S = 90.0  # how long a cancelled job may take to end: Slurm kills its processes after KillWait, usually 30 s
_ENDED = {
    "BOOT_FAIL": "a node did not boot",
    "CANCELLED": "it was cancelled",
    "COMPLETED": "",
    "DEADLINE": "it reached its deadline",
    "FAILED": "",
    "NODE_FAIL": "a node failed",
    "OUT_OF_MEMORY": "it ran out of memory: lower the stage's batch size, or ask for more with runtime.slurm.options",
    "PREEMPTED": "it was preempted and not put back into the queue",
    "TIMEOUT": "it reached its time limit",
}
_GONE = "gone"  # state of a job that Slurm does not know
_AGAIN = "run again to resume"
_ASKED = (signal.SIGTERM, signal.SIGUSR1)  # stages exit by themselves when they get these


@dataclass(frozen=True)
class SlurmJob:
    """A submitted job. Numbers are used again on a new cluster; number and name together are not."""

    number: int
    name: str
    log_start: int
    """Size of the log when it was submitted, bytes."""

    def state(self) -> str | None:
        """Slurm's name of its state, `_GONE` if Slurm does not know it, None if the controller does not answer."""
        asked = _slurm("squeue", "--noheader", "--states=all", f"--jobs={self.number}", "--format=%T|%j")
        if asked.returncode != 0:
            if "Invalid job id" in asked.stderr:
                return _GONE
            logger.warning("squeue does not answer, asking again: %s", " ".join(asked.stderr.split()))
            return None
        state, _, name = asked.stdout.strip().partition("|")
        return state if name == self.name else _GONE

    def cancel(self) -> None:
        """Let Slurm end it: SIGTERM to its processes, SIGKILL after the cluster's KillWait."""
        _slurm("scancel", str(self.number))


def run(process: Process, runtime: RuntimeConfig, *, on_progress: OnProgress) -> None:
    """Run a process as a Slurm job to its end. On any exception (Ctrl-C, cancellation), the job is cancelled first.

    Raises:
        InputError: Slurm is not installed here, or it refuses the job.
        StageFailed: The process failed, or Slurm ended the job.
    """
    if shutil.which("sbatch") is None:
        raise InputError("runtime.launcher is slurm and there is no command sbatch: run on a machine of the cluster")
    job = _earlier(process)
    if job is None:
        job = _submit(process, runtime)
    else:
        logger.warning("attached to Slurm job %d, which is making %s", job.number, process.job.output.name)
    try:
        state = _watch(job, process.record, ProgressFile(process.record, on_progress))
    except BaseException:
        if _cancel(job):
            _forget(process)
        raise
    code = _exit_code(process.record)
    _forget(process)
    if code != 0 and state != "COMPLETED":
        raise _failure(process, job, state, code)


def require_no_job(record: Path) -> None:
    """Check that no Slurm job is writing to a folder.

    Raises:
        InputError: One is, or may be.
    """
    if may_run(record):
        job = _known(record)
        which = "a Slurm job" if job is None else f"Slurm job {job.number}"
        raise InputError(
            f"{which} may still be making {record.parent.name}: run with runtime.launcher=slurm to attach to it, or "
            f"cancel it with scancel; if it is known to have ended, remove {record / JOB}"
        )


def may_run(record: Path) -> bool:
    """Whether a Slurm job may be writing to the folder of this record. Where Slurm cannot be asked, it may."""
    if not (record / JOB).exists():
        return False
    job = _known(record)
    if job is None or shutil.which("squeue") is None:
        return True
    state = job.state()
    return state is None or _is_active(state)


def _earlier(process: Process) -> SlurmJob | None:
    """The job of an earlier run, if it is active or has finished the stage."""
    job = _known(process.record) or _find(_name(process))
    if job is None:
        return None
    write_json(process.record / JOB, asdict(job))
    while (state := job.state()) in (None, "COMPLETING"):
        time.sleep(POLL_S)
    return job if _exit_code(process.record) == 0 or _is_active(str(state)) else None


def _submit(process: Process, runtime: RuntimeConfig) -> SlurmJob:
    record, token, name = process.record, uuid.uuid4().hex, _name(process)
    process.prepare()
    (record / EXIT).unlink(missing_ok=True)
    _write(record / PROBE, token)
    text = script(process, runtime, name=name, probe=record / PROBE, token=token, exit_file=record / EXIT)
    _write(record / SCRIPT, text)
    log_start = process.log.stat().st_size if process.log.exists() else 0
    submitted = _slurm("sbatch", "--parsable", str(record / SCRIPT))
    if submitted.returncode != 0:
        raise InputError(f"sbatch refused the job of {process.name}: {' '.join(submitted.stderr.split())}")
    job = SlurmJob(int(submitted.stdout.partition(";")[0]), name, log_start)
    write_json(record / JOB, asdict(job))
    logger.warning("submitted Slurm job %d for %s, log: %s", job.number, process.job.output.name, process.log)
    return job


def _watch(job: SlurmJob, record: Path, progress: ProgressFile) -> str:
    """Wait for the end of a job and report its progress. Returns its last state."""
    asked = float("-inf")
    while True:
        progress.pass_on()
        code = _exit_code(record)
        if code == 0:  # all processes have ended; Slurm may need longer to notice
            return "COMPLETED"
        if code is not None or time.monotonic() - asked >= ASK_S:
            asked = time.monotonic()
            state = job.state()
            if state is not None and not _is_active(state):
                progress.pass_on()
                return state
        time.sleep(POLL_S)


def _cancel(job: SlurmJob) -> bool:
    """Cancel a job. Returns whether it ended in time. A second Ctrl-C must not interrupt this."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    try:
        job.cancel()
        deadline = time.monotonic() + CANCEL_S
        while (state := job.state()) is None or _is_active(state):
            if time.monotonic() > deadline:
                logger.warning("Slurm job %d is cancelled and has not ended yet", job.number)
                return False
            time.sleep(POLL_S)
        return True
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, previous)


def _forget(process: Process) -> None:
    """Remove the files of a job that has ended."""
    process.clear()
    for name in (JOB, EXIT, PROBE):
        (process.record / name).unlink(missing_ok=True)


def _failure(process: Process, job: SlurmJob, state: str, code: int | None) -> StageFailed:
    """Cause of a failed job: what Slurm did to it, else what its processes said."""
    name, log, number = process.name, process.log, job.number
    if why := _ENDED.get(state):
        return StageFailed(name, f"Slurm job {number}: {why}; {_AGAIN}", 1, log)
    if code == BLIND:
        return StageFailed(name, last_line(log, job.log_start), 2, log)
    if code is None and not _has_started(process, job):
        why = f"its first node cannot write to {process.record}: set runtime.home to a folder that all nodes share"
        return StageFailed(name, f"Slurm job {number} ended as {state} without a line of output: {why}", 2, log)
    if code is None:
        return StageFailed(name, f"Slurm job {number} vanished ({state}, no exit code); {_AGAIN}", 1, log)
    by_signal = code > 128 and code - 128 not in _ASKED
    return failure(process, 128 - code if by_signal else code, job.log_start)


def _has_started(process: Process, job: SlurmJob) -> bool:
    return process.log.exists() and process.log.stat().st_size > job.log_start


def _is_active(state: str) -> bool:
    """Whether a job in this state is running, or will run."""
    return state not in _ENDED and state != _GONE


def _name(process: Process) -> str:
    """Name of the job of an output folder: two homes have different jobs for the same key."""
    folder = process.job.output
    return f"dpar-{folder.name}-{sha256(os.fsencode(folder)).hexdigest()[:8]}"


def _known(record: Path) -> SlurmJob | None:
    """The job whose number is in the record."""
    try:
        return SlurmJob(**read_json(record / JOB))
    except (OSError, ValueError, TypeError):
        return None


def _find(name: str) -> SlurmJob | None:
    """The job of this name in the queue: its submitter died before it wrote the number down."""
    asked = _slurm("squeue", "--noheader", "--me", f"--name={name}", "--format=%i")
    numbers = asked.stdout.split() if asked.returncode == 0 else []
    return SlurmJob(int(numbers[0]), name, 0) if numbers else None


def _exit_code(record: Path) -> int | None:
    try:
        return int((record / EXIT).read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm. A controller that does not answer gives exit code 1 and a message."""
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} took longer than two minutes")
