"""The process of a stage: started, watched, ended, and its error told as one line.

The child leads a process group of its own, so that all of it can be ended; it holds the artifact's lock, so that it is
never two that write; and the kernel ends it when its parent dies.
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

from conf.schema import RuntimeConfig
from pipeline.processes import parent_death_hook
from stages.runtime.artifact import RECORD, read_json
from stages.runtime.job import ERROR_FILE, Job

OnProgress = Callable[[dict[str, Any]], None]
GRACE_S = 15.0  # between asking a stage to end and killing it
JOB_FILE, TORCHRUN_LOGS = "job.json", "torchrun"  # in the record, while the process runs
_POLL_S = 0.2
_TAIL_BYTES = 64 * 1024
_TORCHRUN_REPORT = re.compile(r"^E\d{4} .*failed \(exitcode: (-?\d+)\)", re.MULTILINE)
_TORCHRUN_LINE = re.compile(r"[WEI]\d{4} .*torch/distributed/")
_QUIET = {"DO_NOT_TRACK": "true", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
# Ragged batches have a new shape at every step, and oneDNN keeps a compiled kernel of the last 1024: gigabytes. Enough
# are kept for every fixed shape of a model.
_SMALL = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}


class StageFailed(RuntimeError):
    """A stage's process ended badly. `code` is 2 when the user can fix it, else 1; `kind` is the name of its error."""

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
    """Run the process of a stage or a view to its end, with its output in `record/log.txt`.

    Args:
        name: For messages.
        module: What `python -m` runs.
        job: What it is told to do.
        runtime: Where and how.
        code_root: Folder of the code's packages.
        locks: Descriptors of open locks that the process holds too.
        spmd: Start it by torchrun, in as many processes as the runtime settings say.
        on_progress: Is told how far it is.

    Raises:
        StageFailed: It did not end well.
    """
    record = job.output / RECORD
    record.mkdir(parents=True, exist_ok=True)
    for stale in (job.output / ERROR_FILE, record / "progress.json"):
        stale.unlink(missing_ok=True)
    job.write(record / JOB_FILE)
    try:
        with (record / "log.txt").open("ab") as log:
            log_start = log.tell()  # an earlier attempt may have filled some of it
            process = subprocess.Popen(
                _command(module, runtime, record, spmd=spmd),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | _QUIET | _SMALL | {"PYTHONPATH": _python_path(code_root)},
                pass_fds=locks,
                start_new_session=True,
                preexec_fn=parent_death_hook(),
            )
            _watch(process, record / "progress.json", on_progress)
    finally:
        (record / JOB_FILE).unlink(missing_ok=True)  # it holds paths of this machine
        shutil.rmtree(record / TORCHRUN_LOGS, ignore_errors=True)
    if process.returncode != 0:
        raise _failure(name, job, process.returncode, log_start)


def _python_path(code_root: Path) -> str:
    """The code comes first, so that a package of the same name elsewhere cannot take its place."""
    return os.pathsep.join(part for part in (str(code_root), os.environ.get("PYTHONPATH", "")) if part)


def _command(module: str, runtime: RuntimeConfig, record: Path, *, spmd: bool) -> list[str]:
    command = [sys.executable, "-m"]
    if spmd:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={runtime.processes}"]
        command += [f"--log-dir={record / TORCHRUN_LOGS}", "-m"]  # empty, but left in /tmp for ever if not named
    return [*command, module, "--job", str(record / JOB_FILE)]


def _watch(process: subprocess.Popen[bytes], progress: Path, on_progress: OnProgress) -> None:
    """Wait for the process and pass its progress on; on any exception (Ctrl-C, cancellation) end all of it first."""
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
    except (OSError, ValueError):  # not there yet, or just being replaced
        return seen
    return text


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole process group to end, then insist. A second Ctrl-C must not cut this short."""
    import psutil

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    try:
        # torchrun's workers lead sessions of their own, out of reach of the group's signals.
        descendants = []
        with contextlib.suppress(psutil.NoSuchProcess):
            descendants = psutil.Process(process.pid).children(recursive=True)
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        _signal_group(process, signal.SIGKILL)  # also for grandchildren that outlived the leader
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
    except ProcessLookupError:  # all of it has ended
        return


def _failure(name: str, job: Job, returncode: int, log_start: int) -> StageFailed:
    """What ended the process: a signal, else the error that it left, else the last thing it said."""
    log = job.output / RECORD / "log.txt"
    said, code = _last_words(log, log_start, returncode)
    if code < 0:  # before the error file: another process's error is that this one is gone
        ended_by = signal.Signals(-code).name
        hint = ", perhaps for want of memory: lower the stage's batch size" if ended_by == "SIGKILL" else ""
        return StageFailed(name, f"its process was ended by {ended_by}{hint}", 1, log)
    try:
        error = read_json(job.output / ERROR_FILE)
        return StageFailed(name, error["message"], error["code"], log, error["kind"])
    except (OSError, ValueError, KeyError):
        return StageFailed(name, f"exit code {code}, last line: {said or 'it left no output'}", 1, log)


def _last_words(log: Path, start: int, returncode: int) -> tuple[str, int]:
    """Last line of a process's output, and its exit code; of its first worker to fail when torchrun tells of one."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    report = _TORCHRUN_REPORT.search(text)
    if report is not None:
        text, returncode = text[: report.start()], int(report[1])
    lines = [line.strip() for line in text.splitlines() if line.strip() and not _TORCHRUN_LINE.match(line)]
    return (lines[-1] if lines else ""), returncode
