"""What the parts of `gpu_check.py` share: the device, the sizes, made-up data, clocks, and where findings go."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from model_sizes import DPARS, GPTS, codebook_size
from samplers import CLASSES, GRIDS, Grid, ragged_starts
from torch import Tensor, nn

from models.config import DPARConfig, GPTConfig, VQConfig
from models.packed_patches import PackedPatches, pack_patches
from pipeline.bench.gates import Figures, Gate, Relation, gate

Model = TypeVar("Model", bound=nn.Module)


_NAME_WIDTH, _COSTLIEST = 90, 12


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured.

    Attributes:
        large: Size of the models that are timed.
        base: Size of the models that are compared with the CPU.
        grid: Tokens of an image.
        images: Images in a training batch.
        batches: Images in a sampling batch, each measured.
        vq: The tokenizer.
        pixels: Side of its images.
        vq_images: Images in a batch of it.
        matrix: Side of the matrices whose product is timed.
        copied: Bytes of the copy that is timed.
        repeats: Timed calls of each thing.
    """

    large: str = "L"
    base: str = "B"
    grid: Grid = GRIDS[256]
    images: int = 32
    batches: tuple[int, ...] = (64, 256)
    vq: VQConfig = field(default_factory=VQConfig)
    pixels: int = 256
    vq_images: int = 64
    matrix: int = 8192
    copied: int = 2**30
    repeats: int = 10


TINY = Sizes(
    large="tiny",
    base="tiny",
    grid=Grid(4, 1.81),
    images=2,
    batches=(2,),
    vq=VQConfig(channels=32, channel_multipliers=(1,), num_res_blocks=1, z_channels=32, codebook_size=64),
    pixels=4,
    vq_images=2,
    matrix=64,
    copied=2**16,
    repeats=1,
)


@dataclass
class Bench:
    """A device, the sizes, and what was found on it."""

    device: torch.device
    sizes: Sizes
    began: float = field(default_factory=time.perf_counter)
    gates: list[Gate] = field(default_factory=list)
    figures: Figures = field(default_factory=dict)

    @property
    def on_cuda(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device.type == "cuda"

    def say(self, part: str, **found: Any) -> None:
        """Print a finding as one JSON line."""
        rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}
        print(json.dumps({"part": part, "s": round(time.perf_counter() - self.began, 1), **rounded}), flush=True)

    def note(self, part: str, column: str, **found: float) -> None:
        """Print numbers, and keep them for the table: a column, and rows named by the part."""
        self.say(part, of=column, **found)
        kept = self.figures.setdefault(column, {})
        kept |= {f"{part}: {name.replace('_', ' ')}": float(value) for name, value in found.items()}

    def hold(self, name: str, value: float, relation: Relation, bound: float) -> None:
        """Compare with a bound."""
        self.gates.append(gate(name, value, relation, bound))

    def seconds(self, call: Callable[[], object], repeats: int | None = None, before: int = 2) -> float:
        """Mean seconds of a call, after some that are not counted."""
        repeats = repeats or self.sizes.repeats
        for _ in range(before):
            call()
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        return (time.perf_counter() - start) / repeats

    def work(self, call: Callable[[], object]) -> tuple[float, int, dict[str, float]]:
        """Seconds that the device computes in one call, its kernels, and the milliseconds of the costliest ones.

        A call that takes much longer than that waits for the host. In a rehearsal, operators of the CPU are counted.
        """
        activity = torch.profiler.ProfilerActivity.CUDA if self.on_cuda else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profile:
            call()
            self.wait()
        spent = "self_device_time_total" if self.on_cuda else "self_cpu_time_total"
        events = [event for event in profile.key_averages() if not event.is_user_annotation]
        found = sorted(events, key=lambda event: getattr(event, spent), reverse=True)
        seconds = sum(getattr(event, spent) for event in found) / 1e6
        costliest = {event.key[:_NAME_WIDTH]: round(getattr(event, spent) / 1e3, 2) for event in found[:_COSTLIEST]}
        return seconds, sum(event.count for event in found), costliest

    def wait(self) -> None:
        """Wait for the device."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def peak_gb(self) -> float:
        """Most memory of tensors since the last call, in 10^9 bytes; 0 in a rehearsal."""
        if not self.on_cuda:
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak

    def release(self) -> None:
        """Return the memory of what is no longer referenced."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def made(self, kind: Callable[..., Model], config: object, head_std: float = 0.02) -> Model:
        """A model with the same random weights at every call, its head too, in evaluation mode on the device."""
        torch.manual_seed(0)
        model = kind(config)
        if isinstance(head := getattr(model, "output", None), nn.Linear):
            nn.init.normal_(head.weight, std=head_std)
        return model.eval().to(self.device)

    def gpt_config(self, size: str) -> GPTConfig:
        """LlamaGen."""
        return GPTConfig(**asdict(GPTS[size]), **self._shape(size))

    def dpar_config(self, size: str) -> DPARConfig:
        """DPAR."""
        return DPARConfig(**asdict(DPARS[size]), **self._shape(size))

    def _shape(self, size: str) -> dict[str, int]:
        tokens = self.sizes.grid.num_tokens
        return {"codebook_size": codebook_size(size), "num_tokens": tokens, "num_classes": CLASSES}

    def batch(self, images: int, codes: int) -> tuple[Tensor, Tensor, PackedPatches]:
        """Random tokens, labels and patches of the paper's mean length, on the CPU."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(codes, (images, self.sizes.grid.num_tokens), generator=generator)
        labels = torch.randint(CLASSES, (images,), generator=generator)
        return tokens, labels, pack_patches(ragged_starts(images, self.sizes.grid))


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Is the CUDA code correct, and how fast is it? Prints JSON lines.")
    parser.add_argument("--tiny", action="store_true", help="Rehearse with toy sizes, on a CPU if there is no GPU.")
    parser.add_argument("--seconds", type=float, default=360, help="Stop after this time.")
    parser.add_argument("--parts", nargs="+", help="Only these parts.")
    return parser.parse_args()
