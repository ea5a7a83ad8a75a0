"""Steps of a GPT over its cache, for class-conditional models and for entropy models."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.attention import causal_attention
from models.gpt import GPT
from models.kv_cache import KVCache


def gpt_logits(
    model: GPT, hidden: Float[Tensor, "R D"], slots: Int[Tensor, " R"], positions: Int[Tensor, " R"], cache: KVCache
) -> Float[Tensor, "R V"]:
    """Logits, float32, after the position of each row, whose embedding is `hidden`.

    The sequence of a row is in one of the slots of the cache, which holds the positions before.
    """
    rope = model.rope(model.config.grid, hidden.device)[positions]
    for layer, attend in zip(model.layers, cache.step(slots, positions), strict=True):
        hidden = layer(hidden, rope, attend)
    return model.output(model.norm(hidden)).float()


def prefilled(
    model: GPT, hidden: Float[Tensor, "R M D"], slots: Int[Tensor, " R"], cache: KVCache
) -> Float[Tensor, "R M D"]:
    """Features of the first M positions of some sequences, whose embeddings are `hidden`. The cache keeps them."""
    places = torch.arange(hidden.shape[1], device=slots.device)
    rope = model.rope(model.config.grid, hidden.device)[places]
    for layer, attend in zip(model.layers, cache.prefill(slots[:, None], places, causal_attention), strict=True):
        hidden = layer(hidden, rope, attend)
    return model.norm(hidden)
