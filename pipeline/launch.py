"""Launch the process of a stage, watch it, terminate it, and report its error as one line.

The child leads its own process group, so that the whole group can be terminated. It inherits the artifact's lock, so
that two processes never write at once. The kernel terminates it when its parent dies.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conf.runtime import RuntimeConfig
from pipeline.processes import parent_death_hook
from stages.runtime.artifact import RECORD, read_json
from stages.runtime.job import ERROR_FILE, Job

OnProgress = Callable[[dict[str, Any]], None]
GRACE_S = 15.0  # between SIGTERM and SIGKILL
JOB_FILE, TORCHRUN_LOGS = "job.json", "torchrun"  # in the record folder, while the process runs
_POLL_S = 0.2
_TAIL_BYTES = 64 * 1024
_TORCHRUN_REPORT = re.compile(r"^E\d{4} .*failed \(exitcode: (-?\d+)\)", re.MULTILINE)
_TORCHRUN_LINE = re.compile(r"[WEI]\d{4} .*torch/distributed/")
_QUIET = {"DO_NOT_TRACK": "true", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
# Ragged batches have a new shape at every step. By default oneDNN keeps kernels of the last 1024 shapes, which takes
# gigabytes; 128 are enough for the fixed shapes of a model.
_ONEDNN = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}


class StageFailed(RuntimeError):
    """A stage's process failed. `code` is 2 for a user error, else 1; `kind` is the class name of the error."""

    def __init__(self, stage: str, message: str, code: int, log: Path, kind: str = "") -> None:
        super().__init__(f"stage {stage} failed: {message} (log: {log})")
        self.stage, self.message, self.code, self.log, self.kind = stage, message, code, log, kind


def launch(
    name: str,
    module: str,
    job: Job,
    runtime: RuntimeConfig,
    *,
    code_root: Path,
    locks: Sequence[int],
    spmd: bool = False,
    on_progress: OnProgress = lambda progress: None,
) -> None:
    """Run the process of a stage or a view to its end. Its output goes to `record/log.txt`.

    Args:
        name: Name in messages.
        module: Module to run with `python -m`.
        job: The job: settings, inputs and output folder.
        runtime: Runtime settings.
        code_root: Folder of the code's packages.
        locks: Descriptors of open locks that the process inherits.
        spmd: Start it with torchrun, in `runtime.processes` processes.
        on_progress: Called with the progress of the process.

    Raises:
        StageFailed: The process failed.
    """
    record = job.output / RECORD
    record.mkdir(parents=True, exist_ok=True)
    for stale in (job.output / ERROR_FILE, record / "progress.json"):
        stale.unlink(missing_ok=True)
    job.write(record / JOB_FILE)
    try:
        with (record / "log.txt").open("ab") as log:
            log_start = log.tell()  # the log may hold the output of an earlier attempt
            process = subprocess.Popen(
                _command(module, runtime, record, spmd=spmd),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | _QUIET | _ONEDNN | {"PYTHONPATH": _python_path(code_root)},
                pass_fds=locks,
                start_new_session=True,
                preexec_fn=parent_death_hook(),
            )
            _watch(process, record / "progress.json", on_progress)
    finally:
        (record / JOB_FILE).unlink(missing_ok=True)  # it contains paths of this machine
        shutil.rmtree(record / TORCHRUN_LOGS, ignore_errors=True)
    if process.returncode != 0:
        raise _failure(name, job, process.returncode, log_start)


def _python_path(code_root: Path) -> str:
    """PYTHONPATH with the code first, so that no other package of the same name is imported."""
    return os.pathsep.join(part for part in (str(code_root), os.environ.get("PYTHONPATH", "")) if part)


def _command(module: str, runtime: RuntimeConfig, record: Path, *, spmd: bool) -> list[str]:
    command = [sys.executable, "-m"]
    if spmd:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={runtime.processes}"]
        command += [f"--log-dir={record / TORCHRUN_LOGS}", "-m"]  # otherwise torchrun leaves an empty folder in /tmp
    return [*command, module, "--job", str(record / JOB_FILE)]


def _watch(process: subprocess.Popen[bytes], progress: Path, on_progress: OnProgress) -> None:
    """Wait for the process and report its progress. On any exception (Ctrl-C, cancellation), terminate it first."""
    seen = ""
    try:
        while process.poll() is None:
            seen = _pass_on(progress, seen, on_progress)
            time.sleep(_POLL_S)
        _pass_on(progress, seen, on_progress)
    except BaseException:
        _end(process)
        raise


def _pass_on(progress: Path, seen: str, on_progress: OnProgress) -> str:
    try:
        text = progress.read_text(encoding="utf-8")
        if text != seen:
            on_progress(read_json(progress))
    except (OSError, ValueError):  # not written yet
        return seen
    return text


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate the whole process group: SIGTERM, then SIGKILL. A second Ctrl-C must not interrupt this."""
    import psutil

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    try:
        # torchrun's workers lead their own sessions; signals to the group do not reach them.
        descendants = []
        with contextlib.suppress(psutil.NoSuchProcess):
            descendants = psutil.Process(process.pid).children(recursive=True)
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        _signal_group(process, signal.SIGKILL)  # for grandchildren that outlived the leader
        for descendant in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
        process.wait()
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, previous)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # the group has ended
        return


def _failure(name: str, job: Job, returncode: int, log_start: int) -> StageFailed:
    """Cause of a failure: the signal that ended the process, else its error file, else its last line of output."""
    log = job.output / RECORD / "log.txt"
    said, code = _last_words(log, log_start, returncode)
    if code < 0:  # checked before the error file: the other workers only report that this one is gone
        ended_by = signal.Signals(-code).name
        hint = ", possibly out of memory: lower the stage's batch size" if ended_by == "SIGKILL" else ""
        return StageFailed(name, f"its process was ended by {ended_by}{hint}", 1, log)
    try:
        error = read_json(job.output / ERROR_FILE)
        return StageFailed(name, error["message"], error["code"], log, error["kind"])
    except (OSError, ValueError, KeyError):
        return StageFailed(name, f"exit code {code}, last line: {said or 'no output'}", 1, log)


def _last_words(log: Path, start: int, returncode: int) -> tuple[str, int]:
    """Last line of output and exit code of a process; those of the first failed worker if torchrun reports one."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    report = _TORCHRUN_REPORT.search(text)
    if report is not None:
        text, returncode = text[: report.start()], int(report[1])
    lines = [line.strip() for line in text.splitlines() if line.strip() and not _TORCHRUN_LINE.match(line)]
    return (lines[-1] if lines else ""), returncode
