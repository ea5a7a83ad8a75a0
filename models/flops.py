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
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.config import DPARConfig, EntropyHeadConfig, GPTConfig, NextPatchSchedule
from models.dpar import DPAR, pack_patches
from models.entropy_head import EntropyHead
from models.gpt import GPT
from models.npp import next_patch_loss

_META = torch.device("meta")
_LINEAR = {torch.ops.aten.mm, torch.ops.aten.addmm}
_ALL = "Global"  # FlopCounterMode's name for all that ran, modules or not
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


NOTHING = Macs(linear=0, attention=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Drawing one image with caches.

    Attributes:
        unclassed: The parts that know no class: they run once, guided or not.
        classed: The other parts: classifier-free guidance runs them twice.
    """

    unclassed: Macs = NOTHING
    classed: Macs = NOTHING

    def macs(self, *, guided: bool) -> Macs:
        """Of all parts, with or without guidance."""
        return self.unclassed + self.classed * (2 if guided else 1)

    def __add__(self, other: Sampling) -> Sampling:
        return Sampling(unclassed=self.unclassed + other.unclassed, classed=self.classed + other.classed)

    def __mul__(self, factor: float) -> Sampling:
        return Sampling(unclassed=self.unclassed * factor, classed=self.classed * factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one image costs.

    Attributes:
        parameters: Of the model.
        forward: One pass over all positions at once, as training makes it; a mean where its steps differ.
        sampling: Each position computed once.
    """

    parameters: int
    forward: Macs
    sampling: Sampling

    @property
    def training(self) -> Macs:
        """Forward and backward pass, nothing computed twice."""
        return self.forward * _TRAINING


@dataclass(frozen=True, kw_only=True, slots=True)
class DPARCost(Cost):
    """What one image costs on patches.

    Attributes:
        own_entropy: What sampling takes more where the model's own prediction decides whether a token opens a patch.
            That prediction is made with the open patch. If it closes, the decoder and the head run again.
    """

    own_entropy: Sampling


_Mean = TypeVar("_Mean", Macs, Sampling)


def gpt_cost(config: GPTConfig) -> Cost:
    """LlamaGen: T positions, the class and T - 1 tokens. The entropy model: T - 1 tokens."""
    with _META:
        model = GPT(config)
    tokens, labels = _inputs(config.num_tokens)
    forward = _count(lambda: model(tokens, labels if model.conditional else None))[_ALL]
    drawn = _stepwise(forward, config.num_tokens - (0 if model.conditional else 1))
    return Cost(
        parameters=_parameters(model),
        forward=forward,
        sampling=Sampling(classed=drawn) if model.conditional else Sampling(unclassed=drawn),
    )


def head_sampling(config: DPARConfig) -> Sampling:
    """What sampling takes more where an entropy head decides: it reads the encoder's states of T - 1 tokens."""
    with _META:
        head = EntropyHead(EntropyHeadConfig.of(config, "block"))
    rows = config.num_tokens - 1
    states = torch.empty(1, rows, config.dim, device=_META)
    return Sampling(unclassed=_stepwise(_count(lambda: head(states))[_ALL], rows))


def npp_cost(config: GPTConfig, schedule: NextPatchSchedule, steps: int) -> Cost:
    """LlamaGen by Next Patch Prediction: the forward is the mean over a training of `steps` steps, the rest LlamaGen's.

    Raises:
        ValueError: The grid of tokens has no blocks of the schedule's sides.
    """
    with _META:
        model = GPT(config)
    tokens, labels = _inputs(config.num_tokens)
    ends = (0, *schedule.ends(steps))
    forward = _total(
        _count(partial(next_patch_loss, model, tokens, labels, side))[_ALL] * ((end - begin) / steps)
        for side, (begin, end) in zip(schedule.sides, pairwise(ends), strict=True)
    )
    return Cost(parameters=_parameters(model), forward=forward, sampling=gpt_cost(config).sampling)


def dpar_cost(config: DPARConfig, mean_length: float) -> DPARCost:
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
    return DPARCost(
        parameters=_parameters(model),
        forward=_mean(read, lambda patches: images[patches].forward),
        sampling=_mean(closed, lambda patches: images[patches].sampling),
        own_entropy=_mean(closed, lambda patches: images[patches].own_entropy),
    )


def _dpar_image(model: DPAR, patches: int) -> DPARCost:
    """Count an image whose encoder reads `patches` patches in a forward; a sampler closes as many.

    The sampler feeds each part the rows that a forward feeds it, one by one: linear layers cost the same, attention
    meets no later rows. Two details of the pooling's keys and values, 2 D D a token and layer, are not followed: the
    sampler makes none for the last patch, and pads patches that close together to the longest of them.
    """
    num_tokens = model.config.num_tokens
    starts = torch.zeros(1, num_tokens, dtype=torch.bool)
    starts[0, torch.arange(patches) * (num_tokens - 1) // patches] = True
    counts = _count(lambda: model(*_inputs(num_tokens), pack_patches(starts).to(_META)))
    encoder, decoder, head = (counts[f"DPAR.{part}"] for part in ("local_encoder", "local_decoder", "output"))
    stack = _total(counts[f"DPAR.layers.{layer}"] for layer in range(len(model.layers)))
    decoder_layers = _total(
        counts[f"DPAR.local_decoder.layers.{layer}"] for layer in range(len(model.local_decoder.layers))
    )
    return DPARCost(
        parameters=_parameters(model),
        forward=_total((encoder, stack, decoder, head)),
        sampling=Sampling(
            unclassed=_stepwise(encoder, num_tokens - 1),
            classed=_total((_stepwise(stack, 1 + patches), _stepwise(decoder, num_tokens), head)),
        ),
        own_entropy=Sampling(classed=_later_step(decoder_layers + head, num_tokens) * patches),
    )


def _count(run: Callable[[], object]) -> dict[str, Macs]:
    """MACs of a call: in all, and by the paths of the modules that it calls."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return {
        path: Macs(
            linear=sum(flops for op, flops in by_op.items() if op in _LINEAR) // 2,
            attention=sum(flops for op, flops in by_op.items() if op not in _LINEAR) // 2,
        )
        for path, by_op in counter.get_flop_counts().items()
    }


def _inputs(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and label of one image."""
    tokens = torch.empty(1, num_tokens, dtype=torch.int64, device=_META)
    return tokens, tokens[:, 0]


def _stepwise(macs: Macs, rows: int) -> Macs:
    """The same rows one by one against a cache: a query meets the keys up to its own, not the whole square."""
    return Macs(linear=macs.linear, attention=macs.attention * (rows + 1) / (2 * rows))


def _later_step(macs: Macs, rows: int) -> Macs:
    """One of the same rows against a cache, any of them but the first alike."""
    return Macs(linear=macs.linear / rows, attention=macs.attention * (rows + 2) / (2 * rows**2))


def _neighbours(count: float) -> tuple[int, int]:
    return math.floor(count), math.ceil(count)


def _mean(count: float, of: Callable[[int], _Mean]) -> _Mean:
    """Mean over images that have the whole numbers next to `count`."""
    low, high = _neighbours(count)
    return of(low) * (1 - (count - low)) + of(high) * (count - low)


def _total(macs: Iterable[Macs]) -> Macs:
    return sum(macs, start=NOTHING)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
