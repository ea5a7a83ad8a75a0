"""Launch the process of a stage where the runtime settings say, and watch it to its end.

Only stages that can run as several processes become Slurm jobs. The others, and all views, need no GPU and run here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conf.runtime import RuntimeConfig
from pipeline.launchers import local, slurm
from pipeline.launchers.commands import Process
from pipeline.launchers.failure import StageFailed
from pipeline.launchers.progress import OnProgress
from stages.runtime.errors import InputError
from stages.runtime.job import Job

__all__ = ["OnProgress", "StageFailed", "launch"]


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
        spmd: Whether it may run as several processes, on several machines.
        on_progress: Called with the progress of the process.

    Raises:
        InputError: The launcher cannot start it with these settings, or a Slurm job is making the same artifact.
        StageFailed: The process failed.
    """
    process = process_of(name, module, job, runtime, code_root, spmd=spmd)
    if spmd and runtime.launcher == "slurm":
        slurm.run(process, runtime, on_progress=on_progress)
        return
    if process.nodes > 1:
        raise InputError(
            f"runtime.nodes is {runtime.nodes} and runtime.launcher is {runtime.launcher}: set runtime.nodes=1, or "
            "runtime.launcher=slurm"
        )
    slurm.require_no_job(process.record)
    local.run(process, locks=locks, on_progress=on_progress)


def process_of(name: str, module: str, job: Job, runtime: RuntimeConfig, code_root: Path, *, spmd: bool) -> Process:
    """The process of a stage or a view under these runtime settings; for the arguments see `launch`."""
    process = Process(
        name=name,
        module=module,
        job=job,
        code_root=code_root,
        nodes=runtime.nodes if spmd else 1,
        per_node=runtime.processes if spmd else 1,
    )
    process.record.mkdir(parents=True, exist_ok=True)
    return process
