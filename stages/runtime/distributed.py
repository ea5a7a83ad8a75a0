"""The process group of a stage. Only this module uses torch.distributed; with one process its functions do nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from conf.environment import INIT_METHOD
from conf.runtime import RuntimeConfig
from models.attention import use_backend
from stages.runtime.cores import available_cores
from stages.runtime.errors import InputError

_TIMEOUT = timedelta(minutes=30)
FILE = "file://"  # begins the value of INIT_METHOD


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
    """Context that joins the process group of torchrun's environment and leaves it at the end.

    Work of rank 0 alone, such as saving a model, belongs after the context: in it, the other ranks would wait in a
    collective, which NCCL ends with a timeout.

    Raises:
        InputError: There is no CUDA device for this process.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(runtime)
    _use_attention(runtime, device)
    torch.set_num_threads(runtime.threads or available_cores())
    if size > 1:
        # CPU tensors go through gloo on every machine, so that a flag can be shared without a wait for the GPU.
        on_cuda = device.type == "cuda"
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        dist.init_process_group(
            backend,
            store=_meeting_file(size),
            rank=rank,
            world_size=size,
            timeout=_TIMEOUT,
            device_id=device if on_cuda else None,
        )
    try:
        yield World(rank, size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


def _meeting_file(size: int) -> Any:
    """A store in the file where the processes of one machine meet; None for several, which meet at MASTER_ADDR.

    torch would read a path in an address only up to a `?` or `#`.
    """
    address = os.environ.get(INIT_METHOD)
    if address is None:
        return None
    store = dist.FileStore(address.removeprefix(FILE), size)  # type: ignore[attr-defined]
    store.set_timeout(_TIMEOUT)
    return store


def data_parallel(objective: nn.Module, world: World) -> nn.Module:
    """The module with gradients that are means over all processes; the module itself if there is one process.

    Gradients are views of the buckets that are reduced, so that they are held once.
    """
    if world.size == 1:
        return objective
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=devices, gradient_as_bucket_view=True)


@contextmanager
def own_gradients(objective: nn.Module) -> Iterator[None]:
    """Context in which backward passes add to this process's gradients without a reduction over processes."""
    if isinstance(objective, DistributedDataParallel):
        with objective.no_sync():
            yield
    else:
        yield


def _use_attention(runtime: RuntimeConfig, device: torch.device) -> None:
    try:
        use_backend(runtime.attention, device)
    except ValueError as error:
        raise InputError(f"runtime.{error}") from error


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum of `values` over all processes, on every process. The input is not changed."""
    total = values.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def start_max(values: Sequence[int]) -> Callable[[], list[int]]:
    """Start to find the largest of each number over all processes. The returned function waits for the result.

    The numbers stay on the CPU: there is no wait for a GPU.
    """
    largest = torch.tensor(values, dtype=torch.int64)
    work = dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True) if dist.is_initialized() else None

    def result() -> list[int]:
        if work is not None:
            work.wait()
        numbers: list[int] = largest.tolist()
        return numbers

    return result


def _device(runtime: RuntimeConfig) -> torch.device:
    wanted = runtime.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        if not torch.cuda.is_available():
            raise InputError("runtime.device is cuda and torch sees no CUDA device: use runtime.device=cpu")
        number, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if local > number:
            raise InputError(
                f"{local} processes on a machine with {number} CUDA devices, expected at most one for each device: "
                f"set runtime.processes={number}"
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")
