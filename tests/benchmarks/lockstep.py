"""Sampling in lockstep: all images of a batch take every token step together. The reference of the sampler.

A global step runs only for images whose patch has closed. The benchmarks compare the speed of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from jaxtyping import Bool, Float, Int, Shaped
from lockstep_cache import KVCache
from torch import Tensor

from models.boundaries import Boundaries, EntropyBoundaries, GivenBoundaries, HeadBoundaries, OwnEntropyBoundaries
from models.dpar import DPAR
from models.gpt import GPT, token_entropy
from models.guidance import guidance_scale
from models.layers import Attend
from models.patching import opens_patch
from models.token_sampling import SamplingOptions, sample_token


def sample_gpt(
    model: GPT,
    labels: Int[Tensor, " B"],
    uniforms: Float[Tensor, "B T"],
    options: SamplingOptions,
    prefix: Int[Tensor, "B M"] | None = None,
) -> Int[Tensor, "B T"]:
    """See `models.sampling`."""
    return _sample_all(GPTDecoding(model, labels, options), uniforms, options, prefix)


def sample_dpar(
    model: DPAR,
    labels: Int[Tensor, " B"],
    uniforms: Float[Tensor, "B T"],
    options: SamplingOptions,
    boundaries: Boundaries,
    prefix: Int[Tensor, "B M"] | None = None,
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """See `models.sampling`."""
    decoding = DPARDecoding(model, labels, options, boundaries)
    tokens = _sample_all(decoding, uniforms, options, prefix)
    return tokens, decoding.starts


def gpt_step(model: GPT, hidden: Float[Tensor, "B D"], position: int, cache: KVCache) -> Float[Tensor, "B V"]:
    """Logits, float32, after the position whose embedding is `hidden`. The cache holds the positions before."""
    rope = model.rope(model.config.grid, hidden.device)[position]
    for layer, attend in zip(model.layers, cache.step(position), strict=True):
        hidden = layer(hidden, rope, attend)
    return model.output(model.norm(hidden)).float()


class Deciding:
    """Decides which images of a batch open a patch, by the boundaries of the sampler."""

    def __init__(self, boundaries: Boundaries) -> None:
        self._boundaries = boundaries
        self._cache = KVCache(0, 0)
        if isinstance(boundaries, EntropyBoundaries):
            self._cache = KVCache(len(boundaries.model.layers), boundaries.model.config.num_tokens)
        elif isinstance(boundaries, HeadBoundaries):
            self._cache = KVCache(1, boundaries.head.config.num_tokens)

    def opens(
        self,
        position: int,
        previous: Int[Tensor, " B"],
        state: Float[Tensor, "B D"],
        open_lengths: Int[Tensor, " B"],
        open_logits: Callable[[], Float[Tensor, "B V"]],
    ) -> Bool[Tensor, " B"]:
        """Whether the token at `position` opens a patch. `open_logits` are those of it if it opens none."""
        source = self._boundaries
        if isinstance(source, GivenBoundaries):
            return source.starts[..., position].expand(len(previous))
        if isinstance(source, EntropyBoundaries):
            embedded = source.model.tok_embeddings(previous)
            entropies = token_entropy(gpt_step(source.model, embedded, position - 1, self._cache))
        elif isinstance(source, HeadBoundaries):
            (attend,) = self._cache.step(position - 1)
            entropies = source.head.predict(state, source.head.rope(state.device)[position - 1], attend)
        else:
            assert isinstance(source, OwnEntropyBoundaries)
            entropies = token_entropy(open_logits())
        return opens_patch(source.rule, torch.full_like(open_lengths, position), entropies, open_lengths)


class GPTDecoding:
    """State of a batch of images that are sampled from a GPT. `step` advances all of them by one token."""

    def __init__(self, model: GPT, labels: Int[Tensor, " B"], options: SamplingOptions) -> None:
        self.model, self.options = model, options
        self.labels = _with_null(labels, model.cls_embedding.num_classes, options)
        self.position = 0
        self._cache = KVCache(len(model.layers), model.config.num_tokens)

    def step(self, previous: Int[Tensor, " B"] | None) -> Float[Tensor, "B V"]:
        """Guided logits of the next token, float32, given the token before it (None for the first token)."""
        if previous is None:
            hidden = self.model.cls_embedding(self.labels)
        else:
            hidden = _twice(self.model.tok_embeddings(previous), self.options)
        logits = gpt_step(self.model, hidden, self.position, self._cache)
        logits = _guide(logits, self.options, self.position, self.model.config.num_tokens)
        self.position += 1
        return logits


class DPARDecoding:
    """State of a batch of images that are sampled from a DPAR model.

    Attributes:
        starts: Where patches start, (B, T), decided so far.
        num_patches: Closed patches of each image, (B,).
        open_lengths: Tokens in the open patch of each image, (B,).
    """

    def __init__(
        self, model: DPAR, labels: Int[Tensor, " B"], options: SamplingOptions, boundaries: Boundaries | Deciding
    ) -> None:
        self.model, self.options = model, options
        self._deciding = boundaries if isinstance(boundaries, Deciding) else Deciding(boundaries)
        self.labels = _with_null(labels, model.cls_embedding.num_classes, options)
        batch, num_tokens = len(labels), model.config.num_tokens
        device = labels.device
        self.position = 0
        self.starts = torch.zeros(batch, num_tokens, dtype=torch.bool, device=device)
        self.open_lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.num_patches = torch.zeros(batch, dtype=torch.int64, device=device)
        self._encoder_cache = KVCache(len(model.local_encoder.layers), num_tokens)
        self._global_cache = KVCache(len(model.layers), num_tokens + 1)
        self._decoder_cache = KVCache(len(model.local_decoder.layers), num_tokens)
        self._encoded: list[Tensor] = []  # states (B, T, D) of each encoder layer, the input of the pooling
        self._token_rope = model.token_rope(device)
        self._projections: Tensor | None = None  # context of the open patch for each decoder layer, (layers, B2, D)

    def step(self, previous: Int[Tensor, " B"] | None) -> Float[Tensor, "B V"]:
        """Guided logits of the next token, float32, given the token before it (None for the first token)."""
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
        """Open patches where the boundaries say so. Returns the token's logits if the boundaries evaluated them."""
        evaluated: list[Tensor] = []
        open_logits = partial(self._decode_once, state, evaluated)
        opened = self._deciding.opens(self.position, previous, state, self.open_lengths, open_logits)
        self.starts[:, self.position] = opened
        images = opened.nonzero()[:, 0]
        self._close_patches(images)
        self.open_lengths = torch.where(opened, 0, self.open_lengths)
        return self._decode_again(evaluated[0], state, images) if evaluated else None

    def _decode_once(self, state: Float[Tensor, "B D"], evaluated: list[Tensor]) -> Float[Tensor, "B V"]:
        """Logits for the class of each image if no patch opens. `evaluated` keeps them and those of the null class."""
        if not evaluated:
            evaluated.append(self._decode(state))
        return evaluated[0][: len(state)]

    def _encode(self, previous: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """State of the encoder's last layer at the token before."""
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
        """Pool the open patch of some images, which ends at the token before, and run its global step."""
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
        self, hidden: Float[Tensor, "R2 D"], images: Int[Tensor, " R"], rope: Float[Tensor, "R F 2"] | None = None
    ) -> None:
        """Run one row of some images through the global stack and store its projections for the decoder.

        Without `rope` the row is the class.
        """
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
        """Logits of the token at `position`, for both halves of a guided batch."""
        assert self._projections is not None
        return self._logits(_twice(state, self.options), self._projections, self._decoder_cache.step(self.position))

    def _decode_again(
        self, logits: Float[Tensor, "B2 V"], state: Float[Tensor, "B D"], images: Int[Tensor, " R"]
    ) -> Float[Tensor, "B2 V"]:
        """Logits after the patch of some images has closed: their decoder step runs again, in the same position."""
        assert self._projections is not None
        if not len(images):
            return logits
        rows = _halves(images, len(state), self.options)
        attends = self._decoder_cache.ragged_step(rows, rows.new_full((len(logits),), self.position))
        repeated = self._logits(_twice(state, self.options)[rows], self._projections[:, rows], attends)
        return logits.index_copy(0, rows, repeated)

    def _logits(
        self, hidden: Float[Tensor, "R2 D"], projections: Float[Tensor, "M R2 D"], attends: Iterable[Attend]
    ) -> Float[Tensor, "R2 V"]:
        """Decoder step of R2 rows with the context `projections`, one for each of the M layers."""
        for layer, projection, attend in zip(self.model.local_decoder.layers, projections, attends, strict=True):
            hidden = layer(hidden + projection, self._token_rope[self.position], attend)
        return self.model.output(self.model.norm(hidden)).float()


def _sample_all(
    decoding: GPTDecoding | DPARDecoding,
    uniforms: Float[Tensor, "B T"],
    options: SamplingOptions,
    prefix: Int[Tensor, "B M"] | None,
) -> Int[Tensor, "B T"]:
    """Sample token after token. Tokens of `prefix` are kept."""
    tokens, kept = torch.empty(uniforms.shape, dtype=torch.int64, device=uniforms.device), 0
    if prefix is not None:
        kept = prefix.shape[1]
        if len(prefix) != len(tokens) or kept > tokens.shape[1]:
            raise ValueError(f"prefix is {tuple(prefix.shape)}, expected ({len(tokens)}, 0..{tokens.shape[1]})")
        tokens[:, :kept] = prefix
    for position in range(tokens.shape[1]):
        logits = decoding.step(tokens[:, position - 1] if position else None)
        if position >= kept:
            tokens[:, position] = sample_token(logits, uniforms[:, position], options)
    return tokens


def _guide(
    logits: Float[Tensor, "B2 V"], options: SamplingOptions, position: int, num_tokens: int
) -> Float[Tensor, "B V"]:
    """Classifier-free guidance: unconditional logits plus the scale times the difference."""
    if not options.guided:
        return logits
    conditional, unconditional = logits.chunk(2)
    scale = guidance_scale(position, num_tokens, options.cfg_scale, options.cfg_schedule, options.cfg_interval)
    return conditional if scale == 1.0 else unconditional + scale * (conditional - unconditional)


def _with_null(labels: Int[Tensor, " B"], null: int, options: SamplingOptions) -> Int[Tensor, " B2"]:
    """Labels, with guidance followed by as many null classes."""
    return torch.cat([labels, torch.full_like(labels, null)]) if options.guided else labels


def _twice(rows: Shaped[Tensor, " R ..."], options: SamplingOptions) -> Shaped[Tensor, " R2 ..."]:
    """Rows for both halves of a guided batch."""
    return torch.cat([rows, rows]) if options.guided else rows


def _halves(images: Int[Tensor, " R"], batch: int, options: SamplingOptions) -> Int[Tensor, " R2"]:
    """Rows of some images in both halves of a guided batch."""
    return torch.cat([images, images + batch]) if options.guided else images
