"""Variables of somebody else's launcher reach no process of ours."""

from __future__ import annotations

import os

import pytest

from pipeline.cli.main import run_command
from pipeline.launchers.inherited import forget_other_launchers, inherited

FOREIGN = dict.fromkeys(
    (
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR"),
        *("MASTER_PORT", "TORCHELASTIC_RUN_ID", "PET_NNODES", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID"),
        *("SLURM_CPU_BIND", "SLURMD_NODENAME", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK"),
        *("PMIX_RANK", "MV2_COMM_WORLD_RANK", "MPI_LOCALRANKID", "FLUX_TASK_RANK", "DPAR_INIT_METHOD"),
    ),
    "3",
)
OURS = {
    "PATH": "/bin",
    "SLURM_CONF": "/etc/slurm.conf",
    "CUDA_VISIBLE_DEVICES": "3",
    "OMP_NUM_THREADS": "2",
    "DPAR_PROCESSES": "2",
    "GLOO_SOCKET_IFNAME": "ib0",
    "RANKING": "1",
    "MY_RANK": "1",
}


def test_only_variables_of_launchers_are_left_out() -> None:
    assert inherited(FOREIGN | OURS) == OURS


def test_a_command_forgets_them_for_its_libraries_and_children(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (FOREIGN | OURS).items():
        monkeypatch.setenv(name, value)
    assert run_command(["presets"]) == 0
    assert not set(FOREIGN) & set(os.environ)
    assert set(OURS) <= set(os.environ)
    forget_other_launchers()  # nothing is left to forget
