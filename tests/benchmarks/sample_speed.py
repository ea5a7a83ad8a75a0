"""Sampling with caches: exact, against the published loop, against LlamaGen, and against its own linear layers."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Any

import torch
from model_sizes import BOTH, GPTS
from published_llamagen import PublishedLlamaGen, PublishedSampler
from report import report
from samplers import (
    CLASSES,
    DTYPE,
    GRIDS,
    GUIDED,
    Decoder,
    LlamaGenDecoder,
    OwnClocks,
    Watched,
    dpar,
    entropy_head,
    entropy_model,
    gpt,
    grid_of,
    in_all,
    lockstep_decoder,
    many_starts,
    packed,
    ragged_starts,
    seconds_an_image,
    seconds_of,
)
from torch import Tensor, nn

from models.boundaries import GivenBoundaries
from models.canvas import Canvas
from models.clocks import DONE, Clocks
from models.dpar import DPAR
from models.dpar_steps import GLOBAL, TOKEN, DPARSteps
from models.gpt import GPT, token_entropy
from models.gpt_steps import GPTSteps
from models.packed_linear import PackedLinear
from models.packed_patches import pack_patches
from models.sampling import Sampling
from models.token_sampling import SamplingOptions
from pipeline.bench.gates import Figures, Gate, gate

EXACT_BOUND, LOOP_BOUND, LINEAR_BOUND, CACHE_BOUND = 1e-4, 25.0, 1.4, 0.05
RIVAL_BOUNDS = {  # of images a second, DPAR over LlamaGen, by size, batch and source of boundaries
    ("L", 64): {"entropy model B": 1.1, "entropy model T": 1.25, "entropy head": 1.25},
    ("B", 16): {"entropy head": 1.1},
    ("B", 64): {"entropy head": 1.1},
}
LOCKSTEP_BOUNDS = {1: 0.97, 4: 1.22, 16: 1.12, 64: 0.97}  # of images a second over those in lockstep, by batch
SECONDS_BOUNDS = {("B", 4): 0.81, ("B", 16): 0.70, ("L", 4): 0.72, ("L", 16): 0.67}  # of DPAR over LlamaGen
PUBLISHED_BOUND, TICK_BOUND_US = 0.38, 150.0
EVERY = 16  # prefix lengths of the published loop that are timed
LINEAR_EVERY = 4  # positions of a step beside its linear layers


class Known(Canvas):
    """Images whose tokens are known. Compares the logits of every token with expected ones."""

    tokens_known: Tensor
    expected: Tensor
    worst = 0.0

    def draw(self, logits: Tensor, images: Tensor, positions: Tensor) -> Tensor:
        """Take the known tokens."""
        self.worst = max(self.worst, float((logits - self.expected[images, positions]).abs().max()))
        tokens = self.tokens[images, positions] = self.tokens_known[images, positions]
        return tokens


def exactness(size: str) -> float:
    """Largest difference of cached logits from those of the full forward: DPAR, float32, a ragged batch of 8."""
    model, starts = dpar(size).float(), ragged_starts(8, grid_of(size))
    tokens = torch.randint(model.config.codebook_size, starts.shape, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8)
    canvas = Known(labels, torch.zeros(starts.shape), SamplingOptions(), CLASSES, None)
    canvas.tokens_known, canvas.expected = tokens, model(tokens, labels, pack_patches(starts))
    Sampling(canvas, DPARSteps, packed(model), GivenBoundaries(starts), batch=4).finish()
    return canvas.worst


def loop_over_cached(size: str, entropies_size: str, batch: int) -> float:
    """Time of the published loop over ours, DPAR with an entropy model, by the trapezoidal rule."""
    starts = ragged_starts(batch, grid_of(size))
    model, entropies = dpar(size), gpt(entropies_size, conditional=False)
    boundaries = Watched(many_starts(batch, grid_of(size)), {"entropies": entropy_model(entropies_size)})
    ours = OwnClocks(packed(dpar(size)), boundaries, batch)
    tokens = torch.randint(model.config.codebook_size, starts.shape)
    count = model.config.num_tokens
    lengths = [1, *range(EVERY, count, EVERY), count - 1]
    cached, loop = 0.0, []
    for position in range(count):
        cached += seconds_of(ours.step)
        if position in lengths:
            prefix = tokens[:, :position]
            loop.append(seconds_of(lambda prefix=prefix: prefix_forward(model, entropies, prefix, starts)))
    spans = zip(pairwise(lengths), pairwise(loop), strict=True)
    return sum((b - a) * (first + second) / 2 for (a, b), (first, second) in spans) / cached


def prefix_forward(model: DPAR, entropies: GPT, tokens: Tensor, starts: Tensor) -> None:
    """What the published loop does for one token: all of both models on the whole prefix, guided."""
    embedded = entropies.tok_embeddings(tokens)
    token_entropy(entropies.output(entropies.transform(embedded, None, entropies.config.grid)))
    length = tokens.shape[1]
    twice, labels = tokens.repeat(2, 1), torch.zeros(2 * len(tokens), dtype=torch.int64)
    patches = pack_patches(starts[:, : length + 1].repeat(2, 1))
    rope = model.token_rope(tokens.device)
    states, pooled = model.local_encoder(model.tok_embeddings(twice), patches, rope[1 : length + 1])
    context = model.global_context(pooled, labels, patches)
    start = model.decoder_start_embedding.weight.expand(len(twice), 1, -1)
    hidden = model.local_decoder(torch.cat([start, states], 1), context, patches.target_rows, rope[: length + 1])
    model.output(model.norm(hidden)).float()


Products = list[list[Callable[[], Tensor]]]
"""For each position that is timed, the products of the linear layers of its step, each to be made again on its own."""


def products(model: GPT | DPAR, decoder: Decoder) -> Products:
    """Those of `decoder`, which steps `model`, on random rows as many as it has."""
    found: Products = []

    def record(module: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
        rows = torch.randn_like(inputs[0])
        found[-1].append(lambda: module.forward(rows))

    layers = [module for module in model.modules() if isinstance(module, nn.Linear | PackedLinear)]
    handles = [layer.register_forward_hook(record) for layer in layers]
    for position in range(0, model.config.num_tokens, LINEAR_EVERY):
        found.append([])
        decoder.skip_to(position)
        decoder.step()
    for handle in handles:
        handle.remove()
    return found


def over_linear_layers(make: Callable[[Any], Decoder], plain: GPT | DPAR, fast: GPT | DPAR) -> dict[str, float]:
    """Milliseconds a step, and how much longer that is than its linear layers alone; in turns at each position.

    Twice: the linear layers as torch makes them, and packed.
    """
    alone = {"torch's": products(plain, make(plain)), "packed": products(fast, make(fast))}
    decoder, whole, seconds = make(fast), 0.0, dict.fromkeys(alone, 0.0)
    positions = range(0, fast.config.num_tokens, LINEAR_EVERY)
    for number, position in enumerate(positions):
        decoder.skip_to(position)
        whole += seconds_of(decoder.step)
        for name, calls in alone.items():
            seconds[name] += seconds_of(lambda here=calls[number]: [call() for call in here])
    return {"ms a step": 1000 * whole / len(positions), **{name: whole / total for name, total in seconds.items()}}


def against_others(size: str, batch: int, entropy_models: Sequence[str]) -> dict[str, float]:
    """Seconds an image of LlamaGen, of DPAR with each source of boundaries, and of DPAR in lockstep, in turns.

    All sources run beside one DPAR: each would need a cache of its own otherwise, some gigabytes.
    """
    model, grid = packed(dpar(size)), grid_of(size)
    starts, head = many_starts(batch, grid), "entropy head"
    models = {f"entropy model {name}": entropy_model(name) for name in entropy_models}
    sources = Watched(starts, {head: entropy_head(model), **models})
    lockstep = lockstep_decoder(model, Watched(starts, {head: entropy_head(model)}), batch)
    rivals = {
        "LlamaGen": LlamaGenDecoder(packed(gpt(size)), batch),
        "whole": OwnClocks(model, sources, batch),
        f"{head}, in lockstep": lockstep,
    }
    found = seconds_an_image(rivals, grid.num_tokens)
    return found | in_all(found.pop("whole"), {name: found[name] for name in sources.seconds})


def against_published(size: str, batch: int) -> float:
    """Time of our LlamaGen over that of the published one, in turns."""
    model = gpt(size)
    published = PublishedSampler(PublishedLlamaGen.like(model).to(DTYPE).eval(), batch, GUIDED.cfg_scale)
    found = seconds_an_image(
        {"ours": LlamaGenDecoder(packed(model), batch), "published": published}, model.config.num_tokens
    )
    return found["ours"] / found["published"]


def tick_overhead(slots: int) -> float:
    """Microseconds that the scheduler takes for a tick, median, with steps that only count."""
    starts = many_starts(slots // 2, GRIDS[256])
    clocks = Clocks(len(starts), slots, slots // 2, 2, torch.device("cpu"))
    position, seconds = torch.zeros(slots + 1, dtype=torch.int64), []
    while True:
        began = time.perf_counter()
        if (kind := clocks.fullest(clocks.waiting.tolist())) is None:
            return 1e6 * statistics.median(seconds)
        rows = clocks.take(kind)
        images = clocks.images[rows]
        taken = time.perf_counter() - began
        after = position[rows] + (1 if kind == TOKEN else 0)
        done = after == starts.shape[1]
        opened = starts[images, after.clamp(max=starts.shape[1] - 1)]
        position[rows] = torch.where(done, 0, after)
        waits = torch.where(done, DONE, torch.where(opened & (kind == TOKEN), GLOBAL, TOKEN))
        began = time.perf_counter()
        clocks.put(rows, waits)
        seconds.append(taken + time.perf_counter() - began)


def cache_gates(figures: Figures, size: str, batch: int) -> list[Gate]:
    """Bytes of the caches against 2 T D numbers for each layer and row: two rows a slot, but one in DPAR's encoder.

    LlamaGen has as many slots as a batch has images, DPAR twice as many; both have a spare one.
    """
    llamagen = LlamaGenDecoder(gpt(size), batch)._sampling._steps
    sampled = OwnClocks(dpar(size), Watched(many_starts(batch, grid_of(size))), batch)._sampling._steps
    assert isinstance(llamagen, GPTSteps)
    assert isinstance(sampled, DPARSteps)
    state, of_gpt, of_dpar = sampled.state, gpt(size).config, dpar(size).config
    rows = {
        "LlamaGen": (batch + 1) * 2 * of_gpt.num_layers,
        "DPAR": (2 * batch + 1) * (2 * (of_dpar.global_layers + of_dpar.decoder_layers) + of_dpar.encoder_layers),
    }
    found = {
        "LlamaGen": llamagen._cache.num_bytes,
        "DPAR": sum(cache.num_bytes for cache in (state.encoder_cache, state.global_cache, state.decoder_cache)),
    }
    figures[f"caches at batch {batch}, GB"] = {f"{name}-{size}": count / 1e9 for name, count in found.items()}
    of_row = 2 * of_gpt.num_tokens * of_gpt.dim * DTYPE.itemsize
    return [
        gate(
            f"bytes of the caches of {name}-{size} off the formula, share",
            abs(count / rows[name] / of_row - 1),
            "<",
            CACHE_BOUND,
        )
        for name, count in found.items()
    ]


def roofline(size: str, batch: int, step_ms: float) -> dict[str, float]:
    """What a step of LlamaGen reads, weights once and the cache at half of its length, and how long that takes.

    The bandwidth is that of the sum of a gigabyte.
    """
    config = gpt(size).config
    weights = sum(layer.weight.nbytes for layer in gpt(size).modules() if isinstance(layer, nn.Linear))
    rows = 2 * batch  # two halves; half of the length, keys and values
    cache = rows * config.num_layers * config.num_tokens * config.dim * DTYPE.itemsize
    large = torch.ones(2**28)
    bandwidth = large.nbytes / statistics.median(seconds_of(large.sum) for _ in range(5))
    floor_ms = 1000 * (weights + cache) / bandwidth
    return {
        "MB of weights a step": weights / 1e6,
        "MB of cache a step": cache / 1e6,
        "bandwidth, GB/s": bandwidth / 1e9,
        "step / reading both": step_ms / floor_ms,
    }


def linear_gates(figures: Figures, size: str, batches: Sequence[int]) -> list[Gate]:
    """Both families against their linear layers, at each batch."""
    gates = []
    for batch in batches:
        starts = many_starts(batch, grid_of(size))
        found = {
            f"LlamaGen-{size}": over_linear_layers(
                lambda model, batch=batch: LlamaGenDecoder(model, batch), gpt(size), packed(gpt(size))
            ),
            f"DPAR-{size}": over_linear_layers(
                lambda model, batch=batch, starts=starts: OwnClocks(model, Watched(starts), batch),
                dpar(size),
                packed(dpar(size)),
            ),
        }
        for name, numbers in found.items():
            column = figures.setdefault(f"{name}, batch {batch}", {})
            column |= {"ms a step": numbers["ms a step"], "step / packed linear layers": numbers["packed"]}
            if name.startswith("LlamaGen"):
                column |= roofline(size, batch, numbers["ms a step"])
            gates.append(gate(f"{name}, batch {batch}: step / linear layers", numbers["torch's"], "<", LINEAR_BOUND))
    return gates


def rival_gates(
    figures: Figures, sizes: Sequence[str], batches: Sequence[int], entropy_models: Sequence[str]
) -> list[Gate]:
    """DPAR against LlamaGen of the same size and against itself in lockstep: gates at some batches, figures at all."""
    gates = []
    for size, batch in product(sizes, batches):
        found = against_others(size, batch, entropy_models)
        figures[f"{size}, batch {batch}, s an image"] = found
        gates += [
            gate(
                f"DPAR-{size}, {source} / LlamaGen-{size}, images a second, batch {batch}",
                found["LlamaGen"] / found[source],
                ">",
                bound,
            )
            for source, bound in RIVAL_BOUNDS.get((size, batch), {}).items()
            if source in found
        ]
        head = found["entropy head"]
        if (bound := LOCKSTEP_BOUNDS.get(batch)) is not None:
            ratio = found["entropy head, in lockstep"] / head
            gates.append(gate(f"DPAR-{size}, own clocks / lockstep, images a second, batch {batch}", ratio, ">", bound))
        if (bound := SECONDS_BOUNDS.get((size, batch))) is not None:
            name = f"DPAR-{size}, entropy head / LlamaGen-{size}, seconds an image, batch {batch}"
            gates.append(gate(name, head / found["LlamaGen"], "<", bound))
    return gates


@torch.inference_mode()
def main() -> None:
    """Measure what is asked for and print what was found."""
    options = parsed()
    size, sources = options.size, options.entropy_models
    loop = f"published loop / cached, DPAR-{size}, batch {options.loop_batch}"
    parts: dict[str, Callable[[Figures], list[Gate]]] = {
        "exact": lambda _: [gate("cached logits - full forward's, largest", exactness(size), "<", EXACT_BOUND)],
        "loop": lambda _: [gate(loop, loop_over_cached(size, sources[0], options.loop_batch), ">", LOOP_BOUND)],
        "cache": lambda figures: cache_gates(figures, size, options.linear_batches[-1]),
        "published": lambda _: [
            gate(f"LlamaGen-{size} / published, a token, batch 4", against_published(size, 4), "<", PUBLISHED_BOUND)
        ],
        "clocks": lambda _: [gate("scheduler, microseconds a tick, 256 slots", tick_overhead(256), "<", TICK_BOUND_US)],
        "linear": lambda figures: linear_gates(figures, size, options.linear_batches),
        "rivals": lambda figures: rival_gates(figures, options.rivals, options.batches, sources),
    }
    print(f"weights in {str(DTYPE).removeprefix('torch.')}", file=sys.stderr)
    figures: Figures = {}
    gates = [found for name in options.only or parts for found in parts[name](figures)]
    report(gates, figures)


def parsed() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Sampling with caches.")
    parser.add_argument(
        "--only", nargs="+", choices=["exact", "loop", "cache", "published", "clocks", "linear", "rivals"]
    )
    parser.add_argument("--size", choices=BOTH, default="B", help="Of all parts but the rivals.")
    parser.add_argument("--loop-batch", type=int, default=4)
    parser.add_argument("--linear-batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rivals", nargs="+", choices=BOTH, default=["B", "L"], metavar="SIZE")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64], help="Of the rivals.")
    parser.add_argument(
        "--entropy-models", nargs="+", choices=GPTS, default=["B", "T"], help="The published loop has the first."
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
