"""Parts of `gpu_check.py` that take times: the device itself, training, the tokenizer, sampling."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
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
    """Rates of the tokenizer in four precisions, and the share of its tokens that are those of exact float32."""
    exact = bench.made(VQModel, bench.sizes.vq)
    last = torch.channels_last
    rounded = copy.deepcopy(exact).to(BFLOAT16)
    shape = (bench.sizes.vq_images, 3, bench.sizes.pixels, bench.sizes.pixels)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(bench.device) * 2 - 1
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        with torch.inference_mode():
            tokens = exact.encode(pixels)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    ways: dict[str, tuple[VQModel, bool, Tensor]] = {
        "float32": (exact, False, pixels),
        "bfloat16 autocast": (exact, True, pixels),
        "bfloat16 weights": (rounded, False, pixels),
        "bfloat16 weights, channels_last": (
            copy.deepcopy(rounded).to(memory_format=last),
            False,
            pixels.contiguous(memory_format=last),
        ),
    }
    for name, (model, autocast, images) in ways.items():
        with torch.inference_mode(), torch.autocast(bench.device.type, BFLOAT16, enabled=autocast):
            same = float((model.encode(images) == tokens).float().mean())
            encode = bench.seconds(lambda model=model, images=images: model.encode(images), 3)
            decode = bench.seconds(lambda model=model: model.decode(tokens), 3)
        rates = {"encoded_a_second": len(pixels) / encode, "decoded_a_second": len(pixels) / decode}
        bench.note("tokenizer", f"VQ, {name}", **rates, equal_tokens=same, peak_gb=bench.peak_gb())


def sampling(bench: Bench) -> None:
    """Images a second of both samplers with guidance and bfloat16 weights, beside the floor that memory sets."""
    size, grid = bench.sizes.large, bench.sizes.grid
    gpt = bench.made(GPT, bench.gpt_config(size)).to(BFLOAT16)
    dpar = bench.made(DPAR, bench.dpar_config(size)).to(BFLOAT16)
    head = bench.made(EntropyHead, EntropyHeadConfig.of(dpar.config, "block")).to(BFLOAT16)
    rule = PatchRule(float(head.mean), 4, True, grid.side)
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
