"""Sampling with caches: LlamaGen token by token, and DPAR with boundaries decided once, while drawing.

Random numbers are given: one uniform number a (sample, position) draws a token by the inverse of the cumulative
distribution, so an image depends on its own numbers and not on the batch it is drawn in.

The encoder, the pooling and the entropy model know no class: with guidance they run once for both halves of the batch,
and only the global stack and the decoder run twice. A global step is taken only for images whose patch has closed, and
each patch is projected for the decoder once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.boundaries import Boundaries, NextToken
from models.dpar import DPAR
from models.gpt import GPT
from models.guidance import Schedule, guidance_scale
from models.kv_cache import KVCache
from models.layers import Attend


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a token is drawn from logits. The defaults draw from the model's own distribution."""

    cfg_scale: float = 1.0
    cfg_schedule: Schedule = "constant"
    cfg_interval: tuple[int, int] | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether an unconditional half is needed."""
        return self.cfg_scale > 1.0


def sample_gpt(
    model: GPT,
    labels: Int[Tensor, " B"],
    uniforms: Float[Tensor, "B T"],
    options: SamplingOptions,
    prefix: Int[Tensor, "B K"] | None = None,
) -> Int[Tensor, "B T"]:
    """Tokens drawn from a class-conditional GPT; the first ones are those of `prefix`, if it is given."""
    return _draw_all(GPTDecoding(model, labels, options), uniforms, options, prefix)


def sample_dpar(
    model: DPAR,
    labels: Int[Tensor, " B"],
    uniforms: Float[Tensor, "B T"],
    options: SamplingOptions,
    boundaries: Boundaries,
    prefix: Int[Tensor, "B K"] | None = None,
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Tokens drawn from a DPAR model, and where their patches start.

    The first tokens are those of `prefix`, if it is given; `boundaries` decide for them as for all others.
    """
    decoding = DPARDecoding(model, labels, options, boundaries)
    tokens = _draw_all(decoding, uniforms, options, prefix)
    return tokens, decoding.starts


class GPTDecoding:
    """The state of a batch of images that are being drawn; `step` advances all of them by one token."""

    def __init__(self, model: GPT, labels: Int[Tensor, " B"], options: SamplingOptions) -> None:
        self.model, self.options = model, options
        self.labels = _with_null(labels, model.cls_embedding.num_classes, options)
        self.position = 0
        self._cache = model.new_cache()

    def step(self, previous: Int[Tensor, " B"] | None) -> Float[Tensor, "B V"]:
        """Guided logits of the next token, given the token before it (None before the first)."""
        if previous is None:
            hidden = self.model.cls_embedding(self.labels)
        else:
            hidden = _twice(self.model.tok_embeddings(previous), self.options)
        logits = self.model.step(hidden, self.position, self._cache)
        logits = _guide(logits, self.options, self.position, self.model.config.num_tokens)
        self.position += 1
        return logits


class DPARDecoding:
    """The same for DPAR, which also decides where patches start."""

    def __init__(
        self, model: DPAR, labels: Int[Tensor, " B"], options: SamplingOptions, boundaries: Boundaries
    ) -> None:
        self.model, self.options, self.boundaries = model, options, boundaries
        self.labels = _with_null(labels, model.cls_embedding.num_classes, options)
        batch, num_tokens = len(labels), model.config.num_tokens
        device = labels.device
        self.position = 0
        self.starts = torch.zeros(batch, num_tokens, dtype=torch.bool, device=device)
        self.open_lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.num_patches = torch.zeros(batch, dtype=torch.int64, device=device)  # closed ones
        self._encoder_cache = KVCache(len(model.local_encoder.layers), num_tokens)
        self._global_cache = KVCache(len(model.layers), num_tokens + 1)
        self._decoder_cache = KVCache(len(model.local_decoder.layers), num_tokens)
        self._encoded: list[Tensor] = []  # per encoder layer (B, T, D): what the pooling reads
        self._token_rope = model.token_rope(device)
        self._projections: Tensor | None = None  # (decoder layers, B or 2 B, D): of the open patch's context
        boundaries.begin(batch, num_tokens)

    def step(self, previous: Int[Tensor, " B"] | None) -> Float[Tensor, "B V"]:
        """Guided logits of the next token, given the token before it (None before the first)."""
        if previous is None:
            images = torch.arange(len(self.starts), device=self.starts.device)
            self._global_step(self.model.cls_embedding(self.labels), images)
            state = self.model.decoder_start_embedding.weight.expand(len(self.starts), -1)
            self.starts[:, 0] = True
            logits = None
        else:
            state = self._encode(previous)
            logits = self._decide(previous, state)
        self.open_lengths = self.open_lengths + 1
        if logits is None:
            logits = self._decode(state)
        self.position += 1
        return _guide(logits, self.options, self.position - 1, self.model.config.num_tokens)

    def _decide(self, previous: Int[Tensor, " B"], state: Float[Tensor, "B D"]) -> Float[Tensor, "B2 V"] | None:
        """Open patches where the boundaries want it. The token's logits, if the boundaries asked for them before."""
        asked: list[Tensor] = []

        def open_logits() -> Tensor:
            if not asked:
                asked.append(self._decode(state))
            return asked[0][: len(previous)]

        token = NextToken(self.position, previous, state, self.open_lengths, open_logits)
        opened = self.boundaries.opens(token)
        self.starts[:, self.position] = opened
        images = opened.nonzero()[:, 0]
        self._close_patches(images)
        self.open_lengths = torch.where(opened, 0, self.open_lengths)
        return self._decode_again(asked[0], state, images) if asked else None

    def _encode(self, previous: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """Encoder state of the token at position - 1."""
        place = self.position - 1
        state = self.model.tok_embeddings(previous)
        layers = zip(self.model.local_encoder.layers, self._encoder_cache.step(place), strict=True)
        for index, (layer, attend) in enumerate(layers):
            state = layer(state, self._token_rope[place + 1], attend)
            if len(self._encoded) <= index:
                self._encoded.append(state.new_empty(len(state), self.model.config.num_tokens, state.shape[1]))
            self._encoded[index][:, place] = state
        return state

    def _close_patches(self, images: Int[Tensor, " R"]) -> None:
        """Pool the open patch of the given images, which ends at position - 1, and take its global step."""
        if not len(images):
            return
        last = torch.full_like(images, self.position - 1)
        lengths = self.open_lengths[images]
        first = last - lengths + 1
        offsets = torch.arange(int(lengths.max()), device=images.device)
        places, valid = torch.minimum(first[:, None] + offsets, last[:, None]), offsets < lengths[:, None]
        states = [encoded[images[:, None], places].flatten(0, 1) for encoded in self._encoded]
        pooled = self.model.local_encoder.pool(
            states, torch.arange(places.numel(), device=images.device).view_as(places), valid
        )
        rope = self.model.patch_rope(first, last, self.num_patches[images])
        self.num_patches[images] += 1
        self._global_step(_twice(pooled, self.options), images, rope)

    def _global_step(
        self, hidden: Float[Tensor, "R2 D"], images: Int[Tensor, " R"], rope: Float[Tensor, "R C 2"] | None = None
    ) -> None:
        """Feed one row (the class where `rope` is None) and keep its output's projections for the decoder."""
        rows, last = _halves(images, len(self.starts), self.options), _twice(self.num_patches, self.options)
        if rope is None:
            rope = torch.zeros(len(images), self.model.head_dim // 2, 2, device=hidden.device)
        rope = _twice(rope, self.options)
        for layer, attend in zip(self.model.layers, self._global_cache.ragged_step(rows, last), strict=True):
            hidden = layer(hidden, rope, attend)
        projected = torch.stack([projection(hidden) for projection in self.model.local_decoder.cross_attn_layers])
        if self._projections is None:
            self._projections = projected.new_zeros(len(projected), len(self.labels), projected.shape[-1])
        self._projections[:, rows] = projected

    def _decode(self, state: Float[Tensor, "B D"]) -> Float[Tensor, "B2 V"]:
        """Logits of both halves for the token at `position`."""
        assert self._projections is not None
        return self._logits(_twice(state, self.options), self._projections, self._decoder_cache.step(self.position))

    def _decode_again(
        self, logits: Float[Tensor, "B2 V"], state: Float[Tensor, "B D"], images: Int[Tensor, " R"]
    ) -> Float[Tensor, "B2 V"]:
        """The same after the patch of some images has closed: theirs anew, over the keys and values of before."""
        assert self._projections is not None
        if not len(images):
            return logits
        rows = _halves(images, len(state), self.options)
        attends = self._decoder_cache.ragged_step(rows, rows.new_full((len(logits),), self.position))
        anew = self._logits(_twice(state, self.options)[rows], self._projections[:, rows], attends)
        return logits.index_copy(0, rows, anew)

    def _logits(
        self, hidden: Float[Tensor, "R D"], projections: Float[Tensor, "C R D"], attends: Iterable[Attend]
    ) -> Float[Tensor, "R V"]:
        """Through the decoder, to each of whose C layers the global context has a projection."""
        for layer, projection, attend in zip(self.model.local_decoder.layers, projections, attends, strict=True):
            hidden = layer(hidden + projection, self._token_rope[self.position], attend)
        return self.model.output(self.model.norm(hidden)).float()


def draw(logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], options: SamplingOptions) -> Int[Tensor, " B"]:
    """The token at which the cumulative distribution first exceeds each uniform number in [0, 1)."""
    probabilities = filter_logits(logits / max(options.temperature, 1e-5), options).double().softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    token = torch.searchsorted(cumulative, (uniforms.double() * cumulative[:, -1])[:, None], right=True)[:, 0]
    return token.clamp_(max=logits.shape[1] - 1)


def filter_logits(logits: Float[Tensor, "B V"], options: SamplingOptions) -> Float[Tensor, "B V"]:
    """Minus infinity for tokens outside the top k, then outside the smallest set that holds top p, as LlamaGen does."""
    if 0 < options.top_k < logits.shape[-1]:
        smallest = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if options.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)  # probability of the likelier tokens
        before[:, 0] = 0.0  # the likeliest token always stays
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before > options.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def _draw_all(
    decoding: GPTDecoding | DPARDecoding,
    uniforms: Float[Tensor, "B T"],
    options: SamplingOptions,
    prefix: Int[Tensor, "B K"] | None,
) -> Int[Tensor, "B T"]:
    """Draw token after token; those of `prefix` are taken as they are."""
    tokens, kept = torch.empty(uniforms.shape, dtype=torch.int64, device=uniforms.device), 0
    if prefix is not None:
        kept = prefix.shape[1]
        if len(prefix) != len(tokens) or kept > tokens.shape[1]:
            raise ValueError(f"prefix is {tuple(prefix.shape)}, expected ({len(tokens)}, 0..{tokens.shape[1]})")
        tokens[:, :kept] = prefix
    for position in range(tokens.shape[1]):
        logits = decoding.step(tokens[:, position - 1] if position else None)
        if position >= kept:
            tokens[:, position] = draw(logits, uniforms[:, position], options)
    return tokens


def _guide(
    logits: Float[Tensor, "B2 V"], options: SamplingOptions, position: int, num_tokens: int
) -> Float[Tensor, "B V"]:
    """Classifier-free guidance: the unconditional logits plus the scale times the difference."""
    if not options.guided:
        return logits
    conditional, unconditional = logits.chunk(2)
    scale = guidance_scale(position, num_tokens, options.cfg_scale, options.cfg_schedule, options.cfg_interval)
    return conditional if scale == 1.0 else unconditional + scale * (conditional - unconditional)


def _with_null(labels: Int[Tensor, " B"], null: int, options: SamplingOptions) -> Int[Tensor, " B2"]:
    """The labels, and for guidance the null class of each behind them."""
    return torch.cat([labels, torch.full_like(labels, null)]) if options.guided else labels


def _twice(rows: Tensor, options: SamplingOptions) -> Tensor:
    """Rows for both halves of a guided batch."""
    return torch.cat([rows, rows]) if options.guided else rows


def _halves(images: Int[Tensor, " R"], batch: int, options: SamplingOptions) -> Int[Tensor, " R2"]:
    """Rows of the given images in both halves."""
    return torch.cat([images, images + batch]) if options.guided else images
