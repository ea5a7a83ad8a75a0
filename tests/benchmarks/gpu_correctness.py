"""Parts of `gpu_check.py` that compare the device with the CPU: packed attention, logits, samplers."""

from __future__ import annotations

import copy
from typing import get_args

import torch
from gpu_setup import Bench
from samplers import ragged_starts
from torch import Tensor, nn

from models.attention import Backend, backend_refusal, packed_backend, packed_causal_attention, use_backend
from models.boundaries import GivenBoundaries
from models.dpar import DPAR
from models.gpt import GPT
from models.packed_patches import PackedPatches
from models.sampling import sample_dpar, sample_gpt
from models.token_sampling import SamplingOptions

CPU = torch.device("cpu")
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference of two tensors, as a share of the largest value."""
PEAKED_HEAD = 0.3
"""Deviation of a head's weights with which few tokens are likely: rounding then hardly ever changes a sample."""


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((found.detach().float().cpu() - expected.detach()).abs().max() / expected.detach().abs().max())


class Attended:
    """Packed attention of random rows, with gradients."""

    def __init__(self, lengths: list[int], device: torch.device, dtype: torch.dtype, heads: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randn(sum(lengths), *heads, generator=generator) for _ in range(4)]
        self.inputs = [row.to(device, dtype).requires_grad_() for row in rows[:3]]
        self.gradient = rows[3].to(device, dtype)
        self.attend = packed_causal_attention(lengths, device, heads[1])

    def __call__(self) -> list[Tensor]:
        """The attended rows, then the gradients of queries, keys and values."""
        out = self.attend(*self.inputs)
        return [out, *torch.autograd.grad(out, self.inputs, self.gradient)]


def attention(bench: Bench) -> None:
    """Every backend that has an operator, in both dtypes, with gradients."""
    config = bench.dpar_config(bench.sizes.large)
    heads = (config.num_heads, config.dim // config.num_heads)
    lengths = bench.batch(bench.sizes.images, config.codebook_size)[2].global_lengths
    expected = Attended(lengths, CPU, torch.float32, heads)()
    for dtype in BOUNDS:
        for backend in get_args(Backend):
            if refusal := backend_refusal(backend, bench.device, dtype, heads[1]):
                bench.say("attention", backend=backend, dtype=str(dtype), refused=refusal)
                continue
            compare_backend(bench, backend, dtype, expected, lengths, heads)
        bench.say("attention", dtype=str(dtype), taken=packed_backend(bench.device, dtype, heads[1]))


def compare_backend(
    bench: Bench,
    backend: Backend,
    dtype: torch.dtype,
    expected: list[Tensor],
    lengths: list[int],
    heads: tuple[int, int],
) -> None:
    """One backend against the CPU in float32."""
    use_backend(backend, bench.device)
    try:
        attended = Attended(lengths, bench.device, dtype, heads)
        found = attended()
        seconds = bench.seconds(attended)
        busy, kernels, _ = bench.work(attended)
    finally:
        use_backend("auto", bench.device)
    differences = [apart(one, other) for one, other in zip(found, expected, strict=True)]
    bench.note(
        "attention",
        f"{backend}, {dtype}",
        output=differences[0],
        gradients=max(differences[1:]),
        ms=1000 * seconds,
        busy_ms=1000 * busy,
        kernels=kernels,
    )
    bench.hold(f"packed attention by {backend} in {dtype}, off the CPU", max(differences), "<", BOUNDS[dtype])


def logits(bench: Bench) -> None:
    """Logits of a whole batch: float32 and bfloat16 autocast against float32 on the CPU."""
    size = bench.sizes.base
    for name, model in (
        (f"DPAR-{size}", bench.made(DPAR, bench.dpar_config(size))),
        (f"LlamaGen-{size}", bench.made(GPT, bench.gpt_config(size))),
    ):
        expected = forward(bench, copy.deepcopy(model).cpu(), CPU, autocast=False)
        exact = apart(forward(bench, model, bench.device, autocast=False), expected)
        rounded = apart(forward(bench, model, bench.device, autocast=True), expected)
        bench.note("logits", name, off_in_float32=exact, off_in_bfloat16=rounded)
        bench.hold(f"logits of {name} in float32, off the CPU", exact, "<", BOUNDS[torch.float32])
        bench.hold(f"logits of {name} in bfloat16, off the CPU", rounded, "<", 5 * BOUNDS[torch.bfloat16])


@torch.no_grad()
def forward(bench: Bench, model: nn.Module, device: torch.device, *, autocast: bool) -> Tensor:
    """Logits of four images."""
    config = model.config
    tokens, labels, patches = bench.batch(4, config.codebook_size)
    inputs: list[Tensor | PackedPatches] = [tokens.to(device), labels.to(device)]
    if isinstance(model, DPAR):
        inputs.append(patches.to(device))
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        return model(*inputs)


def samplers(bench: Bench) -> None:
    """Tokens of both samplers with guidance, float32, against the CPU: the same random numbers, the same tokens."""
    size = bench.sizes.base
    for name, model in (
        (f"DPAR-{size}", bench.made(DPAR, bench.dpar_config(size), PEAKED_HEAD)),
        (f"LlamaGen-{size}", bench.made(GPT, bench.gpt_config(size), PEAKED_HEAD)),
    ):
        expected = sampled(bench, copy.deepcopy(model).cpu(), CPU)
        found = sampled(bench, model, bench.device)
        same = float((found == expected).float().mean())
        bench.note("sampler", name, share_of_equal_tokens=same)
        bench.hold(f"tokens sampled by {name} that are the CPU's, share", same, ">", 0.98)


@torch.inference_mode()
def sampled(bench: Bench, model: GPT | DPAR, device: torch.device) -> Tensor:
    """Tokens of two images, on the CPU."""
    grid = bench.sizes.grid
    uniforms = torch.rand(2, grid.num_tokens, generator=torch.Generator().manual_seed(2)).to(device)
    labels, options = torch.arange(2, device=device), SamplingOptions(cfg_scale=2.0)
    if isinstance(model, GPT):
        return sample_gpt(model, labels, uniforms, options).cpu()
    starts = ragged_starts(2, grid).to(device)
    return sample_dpar(model, labels, uniforms, options, GivenBoundaries(starts))[0].cpu()
