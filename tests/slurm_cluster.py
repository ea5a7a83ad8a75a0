"""A real Slurm of two nodes on this machine, in a folder of its own, for the tests of the launcher `slurm`."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from waiting import wait_for

NODES = ("127.0.0.2", "127.0.0.3")  # names that resolve on every Linux without an entry in /etc/hosts
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "unshare")
_CONFIGURATION = """
ClusterName=dpar
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=5
NodeName=127.0.0.[2-3] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=2 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if absent := [name for name in PROGRAMS if _program(name) is None]:
        return f"no {', '.join(absent)} here: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "only root can start a Slurm here"


@dataclass
class Cluster:
    """A running cluster; its commands find it through SLURM_CONF."""

    folder: Path

    @property
    def configuration(self) -> Path:
        return self.folder / "slurm.conf"

    def call(self, *command: str) -> str:
        environment = os.environ | {"SLURM_CONF": str(self.configuration)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def jobs(self) -> list[int]:
        """Numbers of the jobs in the queue."""
        return [int(number) for number in self.call("squeue", "--noheader", "--format=%i").split()]

    def state(self, number: int) -> str:
        return self.call("squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T")

    def start_again(self, number: int) -> None:
        """Wait until a job is in the queue again: its nodes have ended it. Let it start in two seconds, not in six.

        Not at once: a node refuses a job in the second in which it ended it.
        """
        wait_for(lambda: self.state(number) == "PENDING", 60)
        self.call("scontrol", "update", f"jobid={number}", "starttime=now+2")

    def cancel_all(self) -> None:
        for number in self.jobs():
            self.call("scancel", str(number))
        wait_for(lambda: not self.jobs(), 60)

    def start_daemon(self, node: str, *, without: Path | None = None) -> None:
        """Start a node's daemon; with `without`, in a file system in which that folder is empty."""
        command = [str(_program("slurmd")), "-N", node, "-f", str(self.configuration)]
        if without is not None:
            hide = f'mount -t tmpfs none "{without}" && exec "$@"'
            command = ["unshare", "--mount", "bash", "-c", hide, "slurmd", *command]
        subprocess.run(command, check=True, timeout=30)

    def start_node(self, node: str, *, without: Path | None = None) -> None:
        """Start a node's daemon, and wait until the node takes jobs."""
        self.start_daemon(node, without=without)
        wait_for(lambda: node in self.call("sinfo", "--noheader", "--states=idle", "--Node", "--format=%N"), 30)

    def stop_node(self, node: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End a node's daemon. Its jobs go on."""
        _stop(self.folder / f"slurmd-{node}.pid", number)

    def node_of(self, job: int) -> str:
        """First node of a job, on which its script runs."""
        return self.call("squeue", "--noheader", f"--jobs={job}", "--format=%B")

    def lose_node(self, node: str, job: int) -> None:
        """End a node's daemon and all that it runs for a job, as a power cut does."""
        self.stop_node(node, signal.SIGKILL)
        for process in psutil.process_iter(["cmdline"]):
            if f"slurmstepd: [{job}." in " ".join(process.info["cmdline"] or []):
                for each in (process, *process.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
        # Without a word, the controller notices after SlurmdTimeout, five minutes.
        self.call("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster of two idle nodes. Its daemons end with the block."""
    found = Cluster(folder)
    (folder / "state").mkdir()
    controller, first = _free_ports()
    text = _CONFIGURATION.format(folder=folder, controller=controller, first=first, second=first + 1)
    found.configuration.write_text(text)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(64))
    files = {name: f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
    try:
        subprocess.run(
            [str(_program("munged")), "--force", f"--socket={folder}/munge.socket", *files.values()],
            check=True,
            capture_output=True,
            timeout=60,
        )
        subprocess.run([str(_program("slurmctld")), "-f", str(found.configuration)], check=True, timeout=60)
        for node in NODES:
            found.start_node(node)
        yield found
    finally:
        for node in NODES:
            found.stop_node(node)
        for daemon in ("slurmctld", "munge"):
            _stop(folder / f"{daemon}.pid")


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _stop(pid_file: Path, number: signal.Signals = signal.SIGTERM) -> None:
    """End a daemon. Its steps are not its children."""
    with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
        daemon = psutil.Process(int(pid_file.read_text()))
        daemon.send_signal(number)
        for _ in range(500):
            if daemon.status() == psutil.STATUS_ZOMBIE:  # ended; its parent, the init process, looks only now and then
                return
            time.sleep(0.02)
        daemon.kill()


def _free_ports() -> tuple[int, int]:
    """A free port for the controller, and the first of two for the nodes."""
    while True:
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            with contextlib.suppress(OSError, OverflowError):
                three.bind(("127.0.0.1", two.getsockname()[1] + 1))
                return one.getsockname()[1], two.getsockname()[1]
