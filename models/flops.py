"""What a model costs: multiply-accumulates (MACs) of one image, counted on the modules that train and sample.

The modules run on torch's meta device, where shapes flow and nothing is computed, and FlopCounterMode counts each
matrix product. Two kinds are told apart: linear layers (products of two matrices) and attention (batches of products:
queries with keys, weights with values). A forward's attention counts whole squares, as a dense layout computes them.

Not counted: what is element-wise, and the pooling of tokens into patches, which is made of sums: 2 T D a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.config import DPARConfig, GPTConfig
from models.dpar import DPAR, pack_patches
from models.gpt import GPT

_META = torch.device("meta")
_LINEAR = {torch.ops.aten.mm, torch.ops.aten.addmm}
_TRAINING = 3  # a product's backward pass is two products of its size, one for each factor


@dataclass(frozen=True, kw_only=True, slots=True)
class Macs:
    """Multiply-accumulates an image; no whole numbers where patch counts are means."""

    linear: float
    attention: float

    def __add__(self, other: Macs) -> Macs:
        return Macs(linear=self.linear + other.linear, attention=self.attention + other.attention)

    def __mul__(self, factor: float) -> Macs:
        return Macs(linear=self.linear * factor, attention=self.attention * factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one image costs.

    Attributes:
        parameters: Of the model.
        forward: One pass over all positions at once.
        unclassed: Sampling with caches, the parts that know no class: they run once, guided or not.
        classed: Sampling with caches, the other parts: guidance runs them twice.
    """

    parameters: int
    forward: Macs
    unclassed: Macs
    classed: Macs

    @property
    def training(self) -> Macs:
        """Forward and backward pass, nothing computed twice."""
        return self.forward * _TRAINING

    def sampling(self, *, guided: bool) -> Macs:
        """Drawing an image with caches, each position computed once, with or without classifier-free guidance."""
        return self.unclassed + self.classed * (2 if guided else 1)


def gpt_cost(config: GPTConfig) -> Cost:
    """LlamaGen: T positions, the class and T - 1 tokens. The entropy model: T - 1 tokens."""
    with _META:
        model = GPT(config)
    tokens, labels = _inputs(config.num_tokens)
    forward = _count(model, *([tokens, labels] if model.conditional else [tokens]))[""]
    drawn = _stepwise(forward, config.num_tokens - (0 if model.conditional else 1))
    nothing = Macs(linear=0, attention=0)
    return Cost(
        parameters=_parameters(model),
        forward=forward,
        unclassed=nothing if model.conditional else drawn,
        classed=drawn if model.conditional else nothing,
    )


def dpar_cost(config: DPARConfig, mean_length: float) -> Cost:
    """DPAR at a mean patch length in tokens.

    A forward reads T - 1 tokens in (T - 1) / `mean_length` patches: so the paper's GFLOPs (table S1) are met. All T
    tokens are T / `mean_length` patches, of which a sampler closes all but the last. A count that is no whole number is
    the mean over images that have the whole numbers next to it.

    Raises:
        ValueError: The mean length is below 1 token, or leaves less than two patches an image.
    """
    num_tokens = config.num_tokens
    if not 1 <= mean_length <= num_tokens / 2:
        raise ValueError(f"mean patch length is {mean_length}, expected 1 .. {num_tokens / 2:g} of {num_tokens} tokens")
    with _META:
        model = DPAR(config)
    read, closed = (num_tokens - 1) / mean_length, num_tokens / mean_length - 1
    images = {patches: _dpar_image(model, patches) for patches in {*_neighbours(read), *_neighbours(closed)}}
    return Cost(
        parameters=_parameters(model),
        forward=_mean(read, lambda patches: images[patches].forward),
        unclassed=_mean(closed, lambda patches: images[patches].unclassed),
        classed=_mean(closed, lambda patches: images[patches].classed),
    )


def _dpar_image(model: DPAR, patches: int) -> Cost:
    """Count an image whose encoder reads `patches` patches in a forward; a sampler closes as many.

    The sampler feeds each part the rows that a forward feeds it, one by one: linear layers cost the same, attention
    meets no later rows. Two details of the pooling's keys and values, 2 D D a token and layer, are not followed: the
    sampler makes none for the last patch, and pads patches that close together to the longest of them.
    """
    num_tokens = model.config.num_tokens
    starts = torch.zeros(1, num_tokens, dtype=torch.bool)
    starts[0, torch.arange(patches) * (num_tokens - 1) // patches] = True
    counts = _count(model, *_inputs(num_tokens), pack_patches(starts).to(_META))
    encoder, decoder, head = (counts[part] for part in ("local_encoder", "local_decoder", "output"))
    stack = _total(counts[f"layers.{layer}"] for layer in range(len(model.layers)))
    return Cost(
        parameters=_parameters(model),
        forward=_total((encoder, stack, decoder, head)),
        unclassed=_stepwise(encoder, num_tokens - 1),
        classed=_total((_stepwise(stack, 1 + patches), _stepwise(decoder, num_tokens), head)),
    )


def _count(model: nn.Module, *inputs: object) -> dict[str, Macs]:
    """MACs of one forward by module path, as named by `named_modules`."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    root = type(model).__name__
    return {
        path.removeprefix(root).removeprefix("."): Macs(
            linear=sum(flops for op, flops in by_op.items() if op in _LINEAR) // 2,
            attention=sum(flops for op, flops in by_op.items() if op not in _LINEAR) // 2,
        )
        for path, by_op in counter.get_flop_counts().items()
        if path != "Global"
    }


def _inputs(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and label of one image."""
    tokens = torch.empty(1, num_tokens, dtype=torch.int64, device=_META)
    return tokens, tokens[:, 0]


def _stepwise(macs: Macs, rows: int) -> Macs:
    """The same rows one by one against a cache: a query meets the keys up to its own, not the whole square."""
    return Macs(linear=macs.linear, attention=macs.attention * (rows + 1) / (2 * rows))


def _neighbours(count: float) -> tuple[int, int]:
    return math.floor(count), math.ceil(count)


def _mean(count: float, of: Callable[[int], Macs]) -> Macs:
    """Mean over images that have the whole numbers next to `count`."""
    low, high = _neighbours(count)
    return of(low) * (1 - (count - low)) + of(high) * (count - low)


def _total(macs: Iterable[Macs]) -> Macs:
    return sum(macs, start=Macs(linear=0, attention=0))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
