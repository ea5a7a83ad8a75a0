"""The batch script of a stage's Slurm job.

The script first checks that every node sees the launcher's files, then starts one torchrun a node with `srun`. Its exit
code goes to a file, because Slurm forgets finished jobs after minutes. Before the time limit Slurm sends SIGUSR1 to
the script, which passes it to the stage's processes. They save their state and exit, and the job goes back into the
queue. torchrun would die of SIGUSR1: it is started with the signal ignored, which its workers inherit until they set
handlers of their own. A preempted job gets SIGTERM, and Slurm itself puts it back into the queue.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from conf.runtime import RuntimeConfig
from pipeline.launchers.commands import Process
from stages.runtime.job import ERROR_FILE

WARNING_S = 300  # between SIGUSR1 and the time limit: a step and a checkpoint of a large model take a minute or two
BLIND = 66  # exit code when a node does not see the home
_FIRST_PORT, _PORTS = 20000, 10000

_SCRIPT = """#!/bin/bash
{options}

echo "Slurm job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, attempt $((${{SLURM_RESTART_COUNT:-0}} + 1))"
rm -rf {exit} {error} {meeting}
mkdir {meeting}
touch {probe_file}
{exports}

trap 'interrupted=1; limit=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap 'interrupted=1' TERM
# A node with a file system of its own would train alone, or write where nobody looks.
srun --ntasks-per-node=1 bash -c {probe}
if [ $? -ne 0 ]; then echo {blind} > {exit}; exit {blind}; fi

export RENDEZVOUS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):{port}"
srun --kill-on-bad-exit=1 --ntasks-per-node=1 ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} \\
    bash -c {step} &
until interrupted=; wait $!; code=$?; [ -z "$interrupted" ]; do :; done

if [ -n "$limit" ] && [ "$code" -ne 0 ]; then
    # A stage that saves nothing would begin again for ever.
    saved=$(find {output} -newer {probe_file} -type f {unsaved} -print -quit)
    if [ -n "$saved" ] && scontrol requeue "$SLURM_JOB_ID"; then exit; fi
    [ -n "$saved" ] || echo "nothing was saved before the time limit: set runtime.slurm.hours higher"
fi
echo "$code" > {exit}.partial && mv {exit}.partial {exit}
exit "$code"
"""
# What every attempt writes, whether it gets anywhere or not.
_UNSAVED = "! -path '*/record/torchrun/*' ! -path '*/record/slurm.*'" + "".join(
    f" ! -path '*/record/{name}'" for name in ("log.txt", "progress.json", "error.json")
)
# Files made a moment ago appear late on a network file system.
_PROBE = """for attempt in 1 2 3 4 5 6 7 8 9 10; do
    [ "$(cat {path} 2> /dev/null)" = {token} ] && exit
    sleep 1
done
echo "node $SLURMD_NODENAME does not see the files in" {folder}": set runtime.home to a folder that all nodes share"
exit 1"""


def script(process: Process, runtime: RuntimeConfig, *, name: str, probe: Path, token: str, exit_file: Path) -> str:
    """Text of the batch script.

    Args:
        process: The process of the stage.
        runtime: Runtime settings.
        name: Name of the job.
        probe: File that every node must see.
        token: Its content, new for every job.
        exit_file: File for the exit code.
    """
    variables = process.environment() | process.meeting()
    folder = shlex.quote(str(probe.parent))
    probe_text = _PROBE.format(path=shlex.quote(str(probe)), token=shlex.quote(token), folder=folder)
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in _options(process, runtime, name)),
        exit=shlex.quote(str(exit_file)),
        probe_file=shlex.quote(str(probe)),
        output=shlex.quote(str(process.job.output)),
        unsaved=_UNSAVED,
        error=shlex.quote(str(process.job.output / ERROR_FILE)),  # of the attempt before the job was put back
        meeting=shlex.quote(str(process.rendezvous)),
        exports="\n".join(f"export {key}={shlex.quote(value)}" for key, value in variables.items()),
        probe=shlex.quote(probe_text),
        blind=BLIND,
        # Jobs that share a node must not share a port.
        port=f"$(({_FIRST_PORT} + SLURM_JOB_ID % {_PORTS}))",
        step=shlex.quote(f"trap '' USR1; exec {_command(process)}"),
    )


def _options(process: Process, runtime: RuntimeConfig, name: str) -> list[str]:
    slurm = runtime.slurm
    options = [
        f"--job-name={name}",
        f"--nodes={process.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={process.per_node * max(runtime.threads, 1)}",
        f"--output={_literal(process.log)}",
        "--open-mode=append",
        f"--chdir={shlex.quote(str(process.record))}",
        "--requeue",
        f"--signal=B:USR1@{WARNING_S}",
    ]
    if runtime.gpus_per_node:
        options.append(f"--gpus-per-node={runtime.gpus_per_node}")
    if slurm.hours is not None:
        options.append(f"--time={math.ceil(slurm.hours * 60)}")  # minutes
    named = {"partition": slurm.partition, "account": slurm.account}
    return [*options, *(f"--{key}={value}" for key, value in named.items() if value is not None), *slurm.options]


def _literal(path: Path) -> str:
    """A path in an option in which Slurm replaces %j and others."""
    return shlex.quote(str(path).replace("%", "%%"))


def _command(process: Process) -> str:
    """Command line of one node, as shell text. The node's name and the first node's are only known there."""
    if process.nodes == 1:
        return shlex.join(process.command())
    meeting = '--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$RENDEZVOUS"'
    own = '--local-addr="$SLURMD_NODENAME"'
    return f"{shlex.join(process.torchrun)} {meeting} {own} -m {shlex.join(process.arguments)}"
