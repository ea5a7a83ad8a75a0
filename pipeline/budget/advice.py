"""Warnings before stages start: slow bfloat16 on a CPU, too little free disk. Cheap: nothing imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.budget.budget import free_disk, peak_disk
from pipeline.budget.disk import DISKS
from pipeline.budget.images import count_images
from pipeline.budget.shape import shape_of
from pipeline.machine import bfloat16_flags, has_nvidia_device
from pipeline.text import size
from stages.runtime.errors import ArtifactError, InputError


def advice(settings: Settings, runtime: RuntimeConfig, preset: str | None, stages: Sequence[str]) -> Iterator[str]:
    """One line for each thing that will be slow, or will not fit, in the stages that are about to run."""
    if not bfloat16_flags() and not _runs_on_gpu(runtime):
        yield from _slow_bfloat16(settings, stages)
    yield from _full_disk(settings, runtime, preset, stages)


def _runs_on_gpu(runtime: RuntimeConfig) -> bool:
    return runtime.device == "cuda" or (runtime.device == "auto" and has_nvidia_device())


def _slow_bfloat16(settings: Settings, stages: Sequence[str]) -> Iterator[str]:
    slow = {stage: address for stage in stages for address in _bfloat16(stage, getattr(settings, stage))}
    if slow:
        options = " ".join(f"--set {address}=float32" for address in slow.values())
        yield (
            f"{', '.join(slow)} in bfloat16 on a CPU without AVX-512, where matrix products take some 20 times as long "
            f"as in float32: {options}"
        )


def _bfloat16(stage: str, section: Any) -> Iterator[str]:
    """Addresses of a section's settings that make the stage compute in bfloat16."""
    if getattr(section, "precision", None) == "bfloat16":
        yield f"{stage}.precision"
    trains = getattr(section, "source", "train") == "train" and getattr(section, "kind", "") != "none"
    if trains and getattr(getattr(section, "training", None), "precision", None) == "bfloat16":
        yield f"{stage}.training.precision"


def _full_disk(settings: Settings, runtime: RuntimeConfig, preset: str | None, stages: Sequence[str]) -> Iterator[str]:
    try:
        shape = shape_of(settings, *count_images(settings, runtime, preset))
    except (InputError, ArtifactError):  # the stages report missing images and a damaged index
        return
    needed = peak_disk([DISKS[stage](settings, shape) for stage in stages])
    free = free_disk(runtime.home)
    if needed > free:
        yield (
            f"{len(stages)} stages to run will write about {size(needed)} and {runtime.home} has {size(free)} free: "
            "free some space, or set DPAR_HOME"
        )
