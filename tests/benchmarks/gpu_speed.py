"""Parts of `gpu_check.py` that take times: the device itself, training, the tokenizer, sampling."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import torch
from gpu_setup import Bench
from samplers import CLASSES, GUIDED, ragged_starts
from torch import Tensor, nn

from models.boundaries import Boundaries, GivenBoundaries, HeadBoundaries
from models.config import EntropyHeadConfig
from models.dpar import DPAR
from models.entropy_head import EntropyHead
from models.gpt import GPT
from models.macs import Cost, dpar_cost, gpt_cost
from models.patching import PatchRule
from models.sampling import sample_dpar, sample_gpt
from models.vq import VQModel
from stages.training.compiled import compile_blocks
from stages.training.optim import make_optimizer

RECIPE = SimpleNamespace(learning_rate=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
GRAD_CLIP = 1.0
TIME_BOUND = 1.05
BFLOAT16 = torch.bfloat16
_FLOPS_A_MAC = 2


def device_rates(bench: Bench) -> None:
    """What the device can do: a large matrix product, a large copy."""
    bench.say("device", name=torch.cuda.get_device_name() if bench.on_cuda else "CPU", torch=torch.__version__)
    side = bench.sizes.matrix
    matrix = torch.randn(side, side, device=bench.device, dtype=BFLOAT16)
    source = torch.zeros(bench.sizes.copied, device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    flops = _FLOPS_A_MAC * side**3 / bench.seconds(lambda: matrix @ matrix)
    moved = 2 * len(source) / bench.seconds(lambda: target.copy_(source))
    bench.note("device", "device", matrix_product_tflops=flops / 1e12, copy_tb_a_second=moved / 1e12)


def measured(bench: Bench, name: str) -> float:
    """A number of the part `device`, which runs first.

    Raises:
        LookupError: It has not run.
    """
    if "device" not in bench.figures:
        raise LookupError("the part `device` has not run, and this part compares with it: name both in --parts")
    return 1e12 * bench.figures["device"][f"device: {name}"]


def training(bench: Bench, *, compiled: bool = False) -> None:
    """Optimiser steps of LlamaGen and DPAR, eager or with compiled blocks."""
    size, length = bench.sizes.large, bench.sizes.grid.mean_length
    part = "training, compiled" if compiled else "training"
    costs: dict[str, Cost] = {
        "LlamaGen": gpt_cost(bench.gpt_config(size)),
        "DPAR": dpar_cost(bench.dpar_config(size), length),
    }
    seconds = {}
    for family, cost in costs.items():
        step = training_step(bench, family, compiled=compiled)
        bench.peak_gb()
        seconds[family] = bench.seconds(step)
        macs = cost.training.linear + cost.training.attention
        rate = _FLOPS_A_MAC * macs * bench.sizes.images / seconds[family]
        bench.note(
            part,
            f"{family}-{size}",
            ms=1000 * seconds[family],
            images_a_second=bench.sizes.images / seconds[family],
            mfu=rate / measured(bench, "matrix product tflops"),
            peak_gb=bench.peak_gb(),
        )
        busy, kernels, costliest = bench.work(step)
        bench.note(part, f"{family}-{size}", busy_ms=1000 * busy, kernels=kernels)
        bench.say(part, of=f"{family}-{size}", costliest_ms=costliest)
        del step
        bench.release()
    time_ratio = seconds["DPAR"] / seconds["LlamaGen"]
    mac_ratio = costs["DPAR"].forward.linear / costs["LlamaGen"].forward.linear
    bench.note(part, f"DPAR-{size} / LlamaGen-{size}", time=time_ratio, macs=mac_ratio)
    bench.hold(f"{part}: DPAR-{size} / LlamaGen-{size}, time / MACs", time_ratio / mac_ratio, "<", TIME_BOUND)


def training_step(bench: Bench, family: str, *, compiled: bool) -> Callable[[], object]:
    """One step: copies from pinned memory, bfloat16 autocast, clipping, fused AdamW."""
    size = bench.sizes.large
    model: GPT | DPAR
    if family == "DPAR":
        model = bench.made(DPAR, bench.dpar_config(size), head_std=0.0)
    else:
        model = bench.made(GPT, bench.gpt_config(size), head_std=0.0)
    model.train()
    if compiled:
        compile_blocks(model)
    optimizer = make_optimizer(model, cast("Any", RECIPE))
    pin: Callable[[Tensor], Tensor] = Tensor.pin_memory if bench.on_cuda else Tensor.clone
    tokens, labels, patches = bench.batch(bench.sizes.images, model.config.codebook_size)
    tokens, labels, patches = pin(tokens), pin(labels), patches.map(pin)

    def sent(tensor: Tensor) -> Tensor:
        return tensor.to(bench.device, non_blocking=True)

    def step() -> None:
        rest = (patches.map(sent),) if family == "DPAR" else ()
        with torch.autocast(bench.device.type, BFLOAT16):
            loss = model.loss(sent(tokens), sent(labels), *rest)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()

    return step


def tokenizer(bench: Bench) -> None:
    """Rates of the tokenizer in five precisions, and the share of its tokens that are those of exact float32.

    Torch lets cuDNN round float32 convolutions to TF32 unless it is told not to.
    """
    exact = bench.made(VQModel, bench.sizes.vq)
    rounded = copy.deepcopy(exact).to(BFLOAT16)
    last = copy.deepcopy(rounded).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape = (bench.sizes.vq_images, 3, bench.sizes.pixels, bench.sizes.pixels)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(bench.device) * 2 - 1
    ways = [
        Precision("float32", exact, tf32=False),
        Precision("float32, TF32 convolutions", exact),
        Precision("bfloat16 autocast", exact, autocast=True),
        Precision("bfloat16 weights", rounded),
        Precision("bfloat16 weights, channels_last", last, pixels=pixels.contiguous(memory_format=torch.channels_last)),
    ]
    tokens = None
    for way, tuned in product(ways, (False, True)):
        with way.on(bench.device, tuned=tuned), torch.inference_mode():
            images = pixels if way.pixels is None else way.pixels
            found = way.model.encode(images)
            tokens = found if tokens is None else tokens
            encode = bench.seconds(partial(way.model.encode, images), 3)
            decode = bench.seconds(partial(way.model.decode, tokens), 3)
        same = float((found == tokens).float().mean())
        rates = {"encoded_a_second": len(pixels) / encode, "decoded_a_second": len(pixels) / decode}
        name = f"VQ, {way.name}{', tuned' * tuned}"
        bench.note("tokenizer", name, **rates, equal_tokens=same, peak_gb=bench.peak_gb())


@dataclass(frozen=True)
class Precision:
    """A way to compute the tokenizer."""

    name: str
    model: VQModel
    tf32: bool = True
    autocast: bool = False
    pixels: Tensor | None = None

    @contextmanager
    def on(self, device: torch.device, *, tuned: bool) -> Iterator[None]:
        """In the block, convolutions are computed so; `tuned` lets cuDNN try its algorithms first."""
        before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = self.tf32, tuned
        try:
            with torch.autocast(device.type, BFLOAT16, enabled=self.autocast):
                yield
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


def sampling(bench: Bench) -> None:
    """Images a second of both samplers with guidance and bfloat16 weights, beside the floor that memory sets."""
    size, grid = bench.sizes.large, bench.sizes.grid
    gpt = bench.made(GPT, bench.gpt_config(size)).to(BFLOAT16)
    dpar = bench.made(DPAR, bench.dpar_config(size)).to(BFLOAT16)
    head = bench.made(EntropyHead, EntropyHeadConfig.of(dpar.config, "block")).to(BFLOAT16)
    rule = PatchRule(float(head.mean.detach()), 4, True, grid.side)
    for batch in bench.sizes.batches:
        sources: dict[str, Boundaries] = {
            f"DPAR-{size}": GivenBoundaries(ragged_starts(batch, grid).to(bench.device)),
            f"DPAR-{size}, head": HeadBoundaries(head, rule),
        }
        time_sampler(bench, f"LlamaGen-{size}", batch, partial(sample_gpt, gpt), gpt_floor(bench, gpt, batch))
        for name, boundaries in sources.items():
            sampler = partial(sample_dpar, dpar, boundaries=boundaries)
            time_sampler(bench, name, batch, sampler, dpar_floor(bench, dpar, batch))


@torch.inference_mode()
def time_sampler(bench: Bench, name: str, batch: int, sampler: Callable[..., object], floor: float) -> None:
    """Time one batch, after one that is not counted."""
    labels = torch.arange(batch, device=bench.device) % CLASSES
    uniforms = torch.rand(batch, bench.sizes.grid.num_tokens, device=bench.device)
    seconds = bench.seconds(lambda: sampler(labels=labels, uniforms=uniforms, options=GUIDED), 1, before=1)
    bench.note(
        f"sampling, batch {batch}",
        name,
        images_a_second=batch / seconds,
        ms_a_token=1000 * seconds / bench.sizes.grid.num_tokens,
        times_the_floor=seconds / floor,
        peak_gb=bench.peak_gb(),
    )


def gpt_floor(bench: Bench, model: GPT, batch: int) -> float:
    """Least seconds of a guided batch: each step reads all weights but embeddings, and the cached keys and values."""
    steps = model.config.num_tokens
    traffic = steps * weights(model.layers, model.output) + cache(model.layers, steps, 2 * batch, model.config.dim)
    return traffic / measured(bench, "copy tb a second")


def dpar_floor(bench: Bench, model: DPAR, batch: int) -> float:
    """The same for DPAR at the paper's mean patch length: the global stack steps once a patch, the encoder once a pair.

    The floor lets every image step its global stack only where its own patch closes.
    """
    steps, dim = model.config.num_tokens, model.config.dim
    patches = steps / bench.sizes.grid.mean_length
    encoder, decoder = model.local_encoder, model.local_decoder
    traffic = steps * weights(encoder.layers, decoder.layers, model.output)
    traffic += patches * weights(model.layers, encoder.cross_attn_layers, decoder.cross_attn_layers)
    traffic += cache(encoder.layers, steps, batch, dim) + cache(decoder.layers, steps, 2 * batch, dim)
    traffic += cache(model.layers, patches, 2 * batch, dim)
    return traffic / measured(bench, "copy tb a second")


def weights(*modules: nn.Module) -> int:
    """Bytes of their weights."""
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def cache(layers: nn.Module, steps: float, sequences: int, dim: int) -> float:
    """Bytes of bfloat16 keys and values read over all steps: at step i those of i positions."""
    return len(list(layers.children())) * sequences * steps * (steps + 1) / 2 * 2 * dim * BFLOAT16.itemsize
