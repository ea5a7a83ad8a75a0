"""Command lines and environment of a stage's process, the same for every launcher.

torchrun's own store has no authentication and unpickles what it is sent. On one machine it therefore runs without a
port: its rendezvous, and the process group's, meet in files. One process needs no torchrun at all. On several machines
there is no other way than a port of the first one: only run there where the network keeps strangers out.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from conf.environment import INIT_METHOD
from pipeline.processes import python_path
from stages.runtime.artifact import RECORD, remove_partials
from stages.runtime.job import ERROR_FILE, Job

JOB_FILE, TORCHRUN = "job.json", "torchrun"  # in the record folder, while the process runs
_QUIET = {
    "DO_NOT_TRACK": "true",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONUTF8": "1",  # names of files and log.txt do not depend on the locale
}
# Ragged batches have a new shape at every step. By default oneDNN keeps kernels of the last 1024 shapes, which takes
# gigabytes; 128 are enough for the fixed shapes of a model. On a GPU they fragment the memory of torch's allocator.
_RAGGED = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
_ALLOCATOR, _OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


@dataclass(frozen=True, kw_only=True)
class Process:
    """A stage's process, or a view's.

    Attributes:
        name: Name in messages.
        module: Module to run with `python -m`.
        job: Settings, inputs and output folder.
        code_root: Folder of the code's packages.
        nodes: Machines.
        per_node: Processes on each machine.
    """

    name: str
    module: str
    job: Job
    code_root: Path
    nodes: int = 1
    per_node: int = 1

    @property
    def record(self) -> Path:
        """The record folder of the output."""
        return self.job.output / RECORD

    @property
    def log(self) -> Path:
        """File of everything that the process prints."""
        return self.record / "log.txt"

    @property
    def rendezvous(self) -> Path:
        """Folder in which the processes of one machine meet. It must be new at every start."""
        return self.record / TORCHRUN

    def prepare(self) -> None:
        """Remove what an earlier attempt left, and write the job file. No process may be writing to the output."""
        remove_partials(self.job.output)  # they can be as large as checkpoints
        for stale in (self.job.output / ERROR_FILE, self.record / "progress.json"):
            stale.unlink(missing_ok=True)
        shutil.rmtree(self.rendezvous, ignore_errors=True)
        self.job.write(self.record / JOB_FILE)

    def clear(self) -> None:
        """Remove the files that describe this machine: the job file and torchrun's folder."""
        (self.record / JOB_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.rendezvous, ignore_errors=True)

    @property
    def arguments(self) -> list[str]:
        """The module and its arguments, as they follow `python -m`."""
        return [self.module, "--job", str(self.record / JOB_FILE)]

    @property
    def torchrun(self) -> list[str]:
        """Command line of torchrun, without how the machines meet and what runs."""
        module = "torch.distributed.run" if self.nodes > 1 else "stages.runtime.torchrun"
        command = [sys.executable, "-m", module, f"--nnodes={self.nodes}"]
        # Without a folder of its own, torchrun leaves an empty one in /tmp.
        return [*command, f"--nproc-per-node={self.per_node}", f"--log-dir={self.rendezvous / 'logs'}"]

    def command(self) -> list[str]:
        """Command line of a process on one machine."""
        if self.per_node == 1:
            return [sys.executable, "-m", *self.arguments]
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.rendezvous / 'agents'}", "--local-addr=127.0.0.1"]
        return [*self.torchrun, *meeting, "--rdzv-conf=store_type=file", "-m", *self.arguments]

    def environment(self) -> dict[str, str]:
        """Variables that are set for the process, over those that it inherits."""
        found = _QUIET | _RAGGED | {"PYTHONPATH": python_path(self.code_root)}
        if _OLD_ALLOCATOR not in os.environ:
            found[_ALLOCATOR] = os.environ.get(_ALLOCATOR, "expandable_segments:True")
        return found

    def meeting(self) -> dict[str, str]:
        """Variables that tell the processes of one machine where they meet; none for several machines."""
        if self.nodes > 1:
            return {}
        if self.per_node == 1:  # no torchrun: what another one has set is overwritten
            return _ALONE
        found = {INIT_METHOD: f"file://{self.rendezvous / 'ranks'}"}
        found["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # otherwise torchrun opens a port for the processes
        if sys.platform == "linux":
            found |= {name: os.environ.get(name) or "lo" for name in _INTERFACES}
        return found
