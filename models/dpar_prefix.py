"""Prefixes of images that are sampled from DPAR: their tokens are read at once, as in training.

Source: DPAR (arXiv 2512.21867), section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.attention import causal_attention, packed_causal_attention
from models.boundaries import Boundaries, PrefixTokens
from models.canvas import Canvas
from models.dpar import DPAR
from models.dpar_state import DPARState
from models.packed_patches import PackedPatches, pack_patches


def prefill(
    model: DPAR,
    canvas: Canvas,
    boundaries: Boundaries,
    state: DPARState,
    slots: Int[Tensor, " R"],
    images: Int[Tensor, " R"],
) -> Bool[Tensor, " R"]:
    """Bring new images to the token after their prefix. Returns whether that token opens a patch."""
    tokens = canvas.tokens[images, : canvas.kept]
    encoded = _encode(model, state, slots, tokens)
    starts = boundaries.prefill(PrefixTokens(images, slots, tokens, encoded[-1]))  # (R, M + 1)
    canvas.starts[images, : canvas.kept] = starts[:, :-1]
    patches = pack_patches(canvas.twice(starts).cpu()).to(slots.device)
    rows = state.halves(slots)
    pooled = model.local_encoder.pool([canvas.twice(x).flatten(0, 1) for x in encoded], patches.tokens, patches.valid)
    context = _global_context(model, state, rows, pooled, canvas.classes(images), patches)
    _decode(model, state, rows, canvas.twice(encoded[-1]), context, patches)
    state.position[slots] = canvas.kept
    state.first[slots] = torch.where(starts[:, :-1], torch.arange(canvas.kept, device=slots.device), 0).amax(dim=1)
    state.global_rows[slots] = starts[:, :-1].sum(dim=1)  # the class, and all patches but the open one
    return starts[:, -1]


def _encode(
    model: DPAR, state: DPARState, slots: Int[Tensor, " R"], tokens: Int[Tensor, "R M"]
) -> list[Float[Tensor, "R M D"]]:
    """States of the tokens after each layer of the encoder."""
    length, found = tokens.shape[1], []
    hidden, rope = model.tok_embeddings(tokens), state.token_rope[1 : length + 1]
    places = torch.arange(length, device=tokens.device)
    attends = state.encoder_cache.prefill(slots[:, None], places, causal_attention)
    for layer, encoded, attend in zip(model.local_encoder.layers, state.encoded, attends, strict=True):
        hidden = layer(hidden, rope, attend)
        encoded[slots, :length] = hidden
        found.append(hidden)
    state.before[slots] = hidden[:, -1]
    return found


def _global_context(
    model: DPAR,
    state: DPARState,
    rows: Int[Tensor, " R2"],
    pooled: Float[Tensor, "P D"],
    classes: Int[Tensor, " R2"],
    patches: PackedPatches,
) -> Float[Tensor, "G D"]:
    """Output of the global stack. The row of the open patch is not read; its place is taken when it closes."""
    rope = model.patch_rope(patches.first, patches.last, patches.number)
    rope = torch.cat([rope.new_zeros(len(classes), *rope.shape[1:]), rope])[patches.global_order]
    hidden = torch.cat([model.cls_embedding(classes), pooled]).index_select(0, patches.global_order)
    counts = torch.tensor(patches.global_lengths, device=rows.device)
    places = torch.arange(len(hidden), device=rows.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = places.clamp(max=model.config.num_tokens - 1)  # no row is read after a prefix of all tokens
    attend_packed = packed_causal_attention(patches.global_lengths, hidden.device, model.head_dim)
    attends = state.global_cache.prefill(rows.repeat_interleave(counts), places, attend_packed)
    for layer, attend in zip(model.layers, attends, strict=True):
        hidden = layer(hidden, rope, attend)
    return hidden


def _decode(
    model: DPAR,
    state: DPARState,
    rows: Int[Tensor, " R2"],
    encoded: Float[Tensor, "R2 M D"],
    context: Float[Tensor, "G D"],
    patches: PackedPatches,
) -> None:
    """Run the decoder up to the prefix's last token, and keep the context of the open patch."""
    length = encoded.shape[1]
    start = model.decoder_start_embedding.weight.expand(len(rows), 1, -1)
    hidden = torch.cat([start.type_as(encoded), encoded[:, :-1]], dim=1)
    targets = patches.target_rows[:, :length]
    places = torch.arange(length, device=rows.device)
    attends = state.decoder_cache.prefill(rows[:, None], places, causal_attention)
    layers = zip(
        model.local_decoder.layers, model.local_decoder.cross_attn_layers, state.projections, attends, strict=True
    )
    for layer, projection, projections, attend in layers:
        projected = projection(context)
        projections[rows] = projected[targets[:, -1]].type_as(projections)
        hidden = layer(hidden + F.embedding(targets, projected), state.token_rope[:length], attend)
