"""A stage as a Kubernetes manifest: a TrainJob of Kubeflow Trainer 2.2 or later. It has never run on a cluster.

The operator starts one container a machine and tells torchrun in `PET_*` variables how the machines meet. The
containers see the home and the images at the same paths as this machine, through volume claims.

Source: Kubeflow Trainer, `trainer.kubeflow.org/v1alpha1`: TrainJob, Runtime Patches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.runtime import RuntimeConfig
from pipeline.launchers.commands import Process
from stages.runtime.errors import InputError

_MANAGER = "dpar/cli"  # owner of the patch, so that other controllers leave it alone
_NODE = "node"  # name of the job and of its container in the runtimes that Trainer ships
_KEY_CHARACTERS = 8


def manifest(process: Process, runtime: RuntimeConfig) -> dict[str, Any]:
    """The TrainJob of a process, ready for YAML.

    Raises:
        InputError: A path of the job is in no folder of `runtime.kubernetes.claims`.
    """
    settings = runtime.kubernetes
    for path in (process.job.output, *process.job.inputs.values()):
        if not any(path.is_relative_to(folder) for folder in settings.claims.values()):
            raise InputError(
                f"{path} is in no volume claim of runtime.kubernetes.claims, found {_shown(settings.claims)}: "
                "give the claim that holds it, e.g. runtime.kubernetes.claims.data=/data"
            )
    variables = {name: value for name, value in process.environment().items() if name != "PYTHONPATH"}  # the image's
    trainer: dict[str, Any] = {
        "image": settings.image,
        "command": ["python", "-m", "torch.distributed.run", "-m", *process.arguments],
        "env": [{"name": name, "value": value} for name, value in variables.items()],
        "numNodes": process.nodes,
        "numProcPerNode": process.per_node,
    }
    if runtime.gpus_per_node:
        trainer["resourcesPerNode"] = {"limits": {"nvidia.com/gpu": runtime.gpus_per_node}}
    stage, _, key = process.job.output.name.partition("-")
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": f"dpar-{stage.replace('_', '-')}-{key[:_KEY_CHARACTERS]}"},
        "spec": {
            "runtimeRef": {"name": settings.runtime},
            "trainer": trainer,
            "runtimePatches": [{"manager": _MANAGER, "trainingRuntimeSpec": _volumes(settings.claims)}],
        },
    }


def _volumes(claims: dict[str, Path]) -> dict[str, Any]:
    """Patch that mounts every claim at its folder."""
    pod = {
        "volumes": [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in claims],
        "containers": [
            {
                "name": _NODE,
                "volumeMounts": [{"name": name, "mountPath": str(folder)} for name, folder in claims.items()],
            }
        ],
    }
    job = {"name": _NODE, "template": {"spec": {"template": {"spec": pod}}}}
    return {"template": {"spec": {"replicatedJobs": [job]}}}


def _shown(claims: dict[str, Path]) -> str:
    return ", ".join(f"{name}: {folder}" for name, folder in claims.items()) or "none"
