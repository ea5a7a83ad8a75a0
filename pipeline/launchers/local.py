"""Processes on this machine.

The child leads its own process group, so that the whole group can be terminated. It inherits the artifact's lock, so
that two processes never write at once. The kernel terminates it when its parent dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence

from pipeline.launchers.commands import Process
from pipeline.launchers.failure import failure
from pipeline.launchers.inherited import inherited
from pipeline.launchers.progress import OnProgress, ProgressFile
from pipeline.processes import parent_death_hook

GRACE_S = 40.0  # between SIGTERM and SIGKILL; torchrun itself gives its workers 30
_POLL_S = 0.2


def run(process: Process, *, locks: Sequence[int], on_progress: OnProgress) -> None:
    """Run a process to its end. On any exception (Ctrl-C, cancellation), it is terminated first.

    Args:
        process: The process.
        locks: Descriptors of open locks that it inherits.
        on_progress: Called with its progress.

    Raises:
        StageFailed: The process failed.
    """
    process.prepare()
    process.rendezvous.mkdir()
    try:
        with process.log.open("ab") as log:
            log_start = log.tell()
            child = subprocess.Popen(
                process.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=inherited() | process.environment() | process.meeting(),
                pass_fds=locks,
                start_new_session=True,
                preexec_fn=parent_death_hook(),
            )
            _watch(child, ProgressFile(process.record, on_progress))
    finally:
        process.clear()
    if child.returncode != 0:
        raise failure(process, child.returncode, log_start)


def _watch(child: subprocess.Popen[bytes], progress: ProgressFile) -> None:
    """Wait for the process and report its progress."""
    try:
        while child.poll() is None:
            progress.pass_on()
            time.sleep(_POLL_S)
        progress.pass_on()
    except BaseException:
        _end(child)
        raise


def _end(child: subprocess.Popen[bytes]) -> None:
    """Terminate the whole process group: SIGTERM, then SIGKILL. A second Ctrl-C must not interrupt this."""
    import psutil

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    try:
        # torchrun's workers lead their own sessions; signals to the group do not reach them.
        descendants = []
        with contextlib.suppress(psutil.NoSuchProcess):
            descendants = psutil.Process(child.pid).children(recursive=True)
        _signal_group(child, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
        _signal_group(child, signal.SIGKILL)  # for grandchildren that outlived the leader
        for descendant in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
        child.wait()
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, previous)


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:  # the group has ended
        return
