"""Cost of a model in multiply-accumulates (MACs) per image, counted on the modules that train and sample.

The modules run on torch's meta device, which computes shapes only, under FlopCounterMode, which counts matrix products.
There are two kinds of MACs: linear layers (products of two matrices) and attention (batched products of queries with
keys and of weights with values). The attention of a forward pass counts the full square, as a dense layout computes it.
Networks that work on pixels have one number, which is mostly convolutions.

Not counted: element-wise operations, and the pooling of tokens into patches, which consists of sums (2 T D per layer).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.config import DPARConfig, EntropyHeadConfig, GPTConfig, NextPatchSchedule, VQConfig
from models.discriminator import PatchDiscriminator
from models.dpar import DPAR
from models.entropy_head import EntropyHead
from models.gpt import GPT
from models.lpips import LPIPS
from models.npp import next_patch_loss
from models.packed_patches import pack_patches
from models.vq import VQModel

_META = torch.device("meta")
_LINEAR = {torch.ops.aten.mm, torch.ops.aten.addmm}
_ALL = "Global"  # FlopCounterMode's name for the total
_KEPT = 64  # costs kept of each kind: counting a large model takes seconds
_TRAINING = 3  # the backward pass of a product is two products of its size, one for each factor


@dataclass(frozen=True, kw_only=True, slots=True)
class Macs:
    """Multiply-accumulates per image. Not whole numbers where the number of patches is a mean."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        """MACs of both kinds."""
        return self.linear + self.attention

    def __add__(self, other: Macs) -> Macs:
        return Macs(linear=self.linear + other.linear, attention=self.attention + other.attention)

    def __mul__(self, factor: float) -> Macs:
        return Macs(linear=self.linear * factor, attention=self.attention * factor)


NOTHING = Macs(linear=0, attention=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Cost of sampling one image with caches.

    Attributes:
        unconditional: MACs of parts that do not read the class. They run once, with and without guidance.
        conditional: MACs of parts that depend on the class. Classifier-free guidance runs them twice.
        layer_calls: Calls of transformer layers. Each reads the layer's weights, once for all images of a full batch
            and for both halves of guidance.
    """

    unconditional: Macs = NOTHING
    conditional: Macs = NOTHING
    layer_calls: float = 0

    def macs(self, *, guided: bool) -> Macs:
        """MACs of all parts, with or without guidance."""
        return self.unconditional + self.conditional * (2 if guided else 1)

    def __add__(self, other: Sampling) -> Sampling:
        return Sampling(
            unconditional=self.unconditional + other.unconditional,
            conditional=self.conditional + other.conditional,
            layer_calls=self.layer_calls + other.layer_calls,
        )

    def __mul__(self, factor: float) -> Sampling:
        return Sampling(
            unconditional=self.unconditional * factor,
            conditional=self.conditional * factor,
            layer_calls=self.layer_calls * factor,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Cost of one image.

    Attributes:
        parameters: Number of parameters of the model.
        forward: One pass over all positions, as in training. The mean over a training whose steps differ.
        sampling: Cached sampling, which computes each position once.
    """

    parameters: int
    forward: Macs
    sampling: Sampling

    @property
    def training(self) -> Macs:
        """Forward and backward pass, without recomputation."""
        return self.forward * _TRAINING


@dataclass(frozen=True, kw_only=True, slots=True)
class DPARCost(Cost):
    """Cost of one image of a model on patches.

    Attributes:
        own_entropy: Additional MACs of sampling if the model's own prediction decides where patches open. It is made
            as if the patch continued. If the patch closes, the decoder and the head run again.
    """

    own_entropy: Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageCost:
    """MACs of the networks that work on one image.

    Attributes:
        encode: From pixels to tokens.
        decode: From tokens to pixels.
        perceptual: The features of one image in the perceptual loss.
        discriminator: The discriminator's logits of one image.
    """

    encode: float
    decode: float
    perceptual: float
    discriminator: float


_Mean = TypeVar("_Mean", Macs, Sampling)


@lru_cache(_KEPT)
def gpt_cost(config: GPTConfig) -> Cost:
    """Cost of LlamaGen, which reads T positions (class and T - 1 tokens), or of the entropy model (T - 1 tokens)."""
    with _META:
        model = GPT(config)
    tokens, labels = _inputs(config.num_tokens)
    forward = _count(lambda: model(tokens, labels if model.conditional else None))[_ALL]
    rows = config.num_tokens - (0 if model.conditional else 1)
    sampled, calls = _stepwise(forward, rows), rows * config.num_layers
    return Cost(
        parameters=_parameters(model),
        forward=forward,
        sampling=Sampling(
            unconditional=NOTHING if model.conditional else sampled,
            conditional=sampled if model.conditional else NOTHING,
            layer_calls=calls,
        ),
    )


@lru_cache(_KEPT)
def head_sampling(config: DPARConfig) -> Sampling:
    """Additional MACs of sampling with an entropy head, which reads the encoder's states of T - 1 tokens."""
    with _META:
        head = EntropyHead(EntropyHeadConfig.of(config, "block"))
    rows = config.num_tokens - 1
    states = torch.empty(1, rows, config.dim, device=_META)
    return Sampling(unconditional=_stepwise(_count(lambda: head(states))[_ALL], rows), layer_calls=rows)


def npp_cost(config: GPTConfig, schedule: NextPatchSchedule, steps: int) -> Cost:
    """Cost of LlamaGen trained by Next Patch Prediction.

    `forward` is the mean over a training of `steps` steps. Parameters and sampling are LlamaGen's.

    Raises:
        ValueError: A side of the schedule's blocks does not divide the grid of tokens.
    """
    ends = (0, *schedule.ends(steps))
    forward = _total(
        block_macs(config, side) * ((end - begin) / steps)
        for side, (begin, end) in zip(schedule.sides, pairwise(ends), strict=True)
    )
    llamagen = gpt_cost(config)
    return Cost(parameters=llamagen.parameters, forward=forward, sampling=llamagen.sampling)


@lru_cache(_KEPT)
def block_macs(config: GPTConfig, side: int) -> Macs:
    """Cost of one image's forward pass in Next Patch Prediction on blocks of `side` x `side` tokens.

    Raises:
        ValueError: The side does not divide the grid of tokens.
    """
    with _META:
        model = GPT(config)
    tokens, labels = _inputs(config.num_tokens)
    return _count(lambda: next_patch_loss(model, tokens, labels, side))[_ALL]


@lru_cache(_KEPT)
def dpar_cost(config: DPARConfig, mean_length: float) -> DPARCost:
    """Cost of DPAR at a mean patch length in tokens.

    A forward pass reads T - 1 tokens in (T - 1) / `mean_length` patches, which reproduces the paper's GFLOPs (DPAR,
    table S1). All T tokens are T / `mean_length` patches, of which a sampler closes all but the last. The cost of a
    fractional number of patches is interpolated between the two whole numbers next to it.

    Raises:
        ValueError: The mean length is below 1 token, or leaves fewer than two patches per image.
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


@lru_cache(_KEPT)
def image_cost(config: VQConfig, image_size: int) -> ImageCost:
    """Cost of an image of `image_size` pixels in the tokenizer and in the networks of its losses."""
    with _META:
        model, lpips, discriminator = VQModel(config), LPIPS(), PatchDiscriminator().eval()
        pixels = torch.empty(1, 3, image_size, image_size)
        tokens = torch.empty(1, (image_size // config.downsample) ** 2, dtype=torch.int64)
    nearest = tokens.numel() * config.codebook_size * config.codebook_dim  # the meta device has no autocast for it
    compared = _products(lambda: lpips(pixels, pixels))
    return ImageCost(
        encode=_products(lambda: model.quant_conv(model.encoder(pixels))) + nearest,
        decode=_products(lambda: model.decode(tokens)),
        perceptual=compared / 2,
        discriminator=_products(lambda: discriminator(pixels)),
    )


def _products(run: Callable[[], object]) -> float:
    """MACs of all kinds of products of a call."""
    return _count(run)[_ALL].total


def _dpar_image(model: DPAR, patches: int) -> DPARCost:
    """Cost of an image of which a forward pass reads `patches` patches and a sampler closes as many.

    The sampler computes the rows of a forward pass one by one. Linear layers cost the same, and attention skips later
    rows. What depends on how a sampler fills its batches is ignored: keys and values of the pooling (2 D D per token
    and layer), which it computes for no last patch, and for patches that close together as if all were the longest; the
    encoder on the last token, which nobody reads; the encoder on a token that the model's own entropy then closes at.
    """
    config, num_tokens = model.config, model.config.num_tokens
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
            unconditional=_stepwise(encoder, num_tokens - 1),
            conditional=_total((_stepwise(stack, 1 + patches), _stepwise(decoder, num_tokens), head)),
            layer_calls=num_tokens * (config.encoder_layers + config.decoder_layers)
            + (1 + patches) * config.global_layers,
        ),
        own_entropy=Sampling(
            conditional=_later_step(decoder_layers + head, num_tokens) * patches,
            layer_calls=patches * config.decoder_layers,
        ),
    )


def _count(run: Callable[[], object]) -> dict[str, Macs]:
    """MACs of a call: the total, and by module path."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return {
        path: Macs(
            linear=sum(flops for op, flops in by_op.items() if op in _LINEAR) // 2,
            attention=sum(flops for op, flops in by_op.items() if op not in _LINEAR) // 2,
        )
        for path, by_op in counter.get_flop_counts().items()
    }


def _inputs(num_tokens: int) -> tuple[Int[Tensor, "1 T"], Int[Tensor, " 1"]]:
    """Tokens and label of one image, on the meta device."""
    tokens = torch.empty(1, num_tokens, dtype=torch.int64, device=_META)
    return tokens, tokens[:, 0]


def _stepwise(macs: Macs, rows: int) -> Macs:
    """Cost of the same rows one by one with a cache: a query is multiplied with the keys up to its own only."""
    return Macs(linear=macs.linear, attention=macs.attention * (rows + 1) / (2 * rows))


def _later_step(macs: Macs, rows: int) -> Macs:
    """Mean cost of one of the same rows with a cache, over all rows but the first."""
    return Macs(linear=macs.linear / rows, attention=macs.attention * (rows + 2) / (2 * rows**2))


def _neighbours(count: float) -> tuple[int, int]:
    return math.floor(count), math.ceil(count)


def _mean(count: float, of: Callable[[int], _Mean]) -> _Mean:
    """Value of `of` at a fractional `count`, interpolated between the whole numbers next to it."""
    low, high = _neighbours(count)
    return of(low) * (1 - (count - low)) + of(high) * (count - low)


def _total(macs: Iterable[Macs]) -> Macs:
    return sum(macs, start=NOTHING)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
