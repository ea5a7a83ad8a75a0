"""The process group of a stage. Only this module uses torch.distributed; with one process its functions do nothing."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from conf.runtime import RuntimeConfig
from models.attention import use_backend
from stages.runtime.errors import InputError
from stages.runtime.job import INIT_METHOD


@dataclass(frozen=True)
class World:
    """Rank and device of this process, and the number of processes that torchrun started."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes all files that are written once."""
        return self.rank == 0


@contextmanager
def process_group(runtime: RuntimeConfig) -> Iterator[World]:
    """Context that joins the process group of torchrun's environment and leaves it at the end."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(runtime)
    _use_attention(runtime, device)
    torch.set_num_threads(
        runtime.threads or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    )
    if size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        init_method = os.environ.get(INIT_METHOD)
        dist.init_process_group(
            backend, init_method=init_method, rank=rank, world_size=size, timeout=timedelta(minutes=30)
        )
    try:
        yield World(rank, size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


def _use_attention(runtime: RuntimeConfig, device: torch.device) -> None:
    try:
        use_backend(runtime.attention, device)
    except ValueError as error:
        raise InputError(f"runtime.{error}") from error


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over all processes, on every process. The input is not changed."""
    total = values.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def return_free_memory() -> None:
    """Return the allocator's free pages to the system (Linux).

    Batches of patches change their shape at every step. This fragments the heap: without the call, a process that
    needs one gigabyte grows to four.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _device(runtime: RuntimeConfig) -> torch.device:
    wanted = runtime.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        if not torch.cuda.is_available():
            raise InputError("runtime.device is cuda and torch sees no CUDA device: use runtime.device=cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")
