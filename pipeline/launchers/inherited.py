"""The environment that dpar's processes inherit, without the variables of another launcher.

A shell inside an srun, mpirun or torchrun job has variables that say which rank it is. `dpar` is never a rank: a
command in such a shell is one process, and the stages that it starts are told their ranks by `pipeline.launchers`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from conf.environment import INTERNAL

_NAMES = frozenset(
    {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK"}
    | {"ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}
    | set(INTERNAL)
)
_PREFIXES = (
    *("MASTER_", "TORCHELASTIC_", "PET_"),  # torchrun; PET_ are its options
    *("SLURM_", "SLURMD_"),
    *("OMPI_", "PMI_", "PMIX_", "PRTE_", "MPI_LOCAL", "MV2_COMM_WORLD_", "HYDRA_", "HYDI_", "I_MPI_HYDRA_", "PALS_"),
    *("JSM_", "FLUX_TASK_", "FLUX_JOB_"),
)
# What Slurm's commands need to reach the cluster; the rest describes a job.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_DEBUG_FLAGS", "SLURM_TIME_FORMAT"})


def inherited(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that do not belong to another launcher."""
    return {name: value for name, value in environment.items() if not _of_a_launcher(name)}


def forget_other_launchers() -> None:
    """Remove the variables of other launchers from this process, for its libraries and its children."""
    for name in set(os.environ) - set(inherited()):
        del os.environ[name]


def _of_a_launcher(name: str) -> bool:
    return name in _NAMES or (name.startswith(_PREFIXES) and name not in _KEPT)
