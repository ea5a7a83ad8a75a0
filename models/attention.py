"""Causal attention of whole sequences, padded or packed. Attention of single cached steps is in kv_cache.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from models.layers import Attend


def causal_attention(
    q: Float[Tensor, "B S H K"], k: Float[Tensor, "B S H K"], v: Float[Tensor, "B S H K"]
) -> Float[Tensor, "B S H K"]:
    """Attention in which each position attends to itself and to those before it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # Torch's CPU kernel for bfloat16 takes four times as long, nearly all of it in the backward pass.
        later = torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        return plain_attention(q, k, v, later).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def plain_attention(
    q: Float[Tensor, "B H Q K"],
    k: Float[Tensor, "B H S K"],
    v: Float[Tensor, "B H S K"],
    masked: Bool[Tensor, "#B #H #Q S"] | None = None,
) -> Float[Tensor, "B H Q K"]:
    """Attention of Q queries by its definition, with a float32 softmax. It ignores positions that are `masked`."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, Q, S)
    if masked is not None:
        scores = scores.masked_fill(masked, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).type_as(v) @ v


def packed_causal_attention(lengths: Sequence[int], device: torch.device) -> Attend:
    """Causal attention inside each sequence of a packed batch.

    Args:
        lengths: Rows of each sequence, which follow each other in the packed batch. They are Python numbers: reading
            them from a device would force a sync in every step.
        device: Where the batch is. On CUDA xformers attends without padding. Elsewhere sequences are padded on the
            right, where the causal mask hides the padding from every real position.

    Returns:
        A function of queries, keys and values (sum of `lengths`, H, K).
    """
    return _xformers_attention(lengths, device) if device.type == "cuda" else _padded_attention(lengths, device)


def _padded_attention(lengths: Sequence[int], device: torch.device) -> Attend:
    shape = (len(lengths), max(lengths))
    real = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    places = real.flatten().nonzero()[:, 0].to(device)  # of the packed rows in the padded batch

    def pad(packed: Float[Tensor, "G H K"]) -> Float[Tensor, "B S H K"]:
        padded = packed.new_zeros(real.numel(), *packed.shape[1:])
        return padded.index_copy(0, places, packed).unflatten(0, shape)

    def attend(
        q: Float[Tensor, "G H K"], k: Float[Tensor, "G H K"], v: Float[Tensor, "G H K"]
    ) -> Float[Tensor, "G H K"]:
        return causal_attention(pad(q), pad(k), pad(v)).flatten(0, 1).index_select(0, places)

    return attend


def _xformers_attention(lengths: Sequence[int], device: torch.device) -> Attend:
    bias = _xformers().fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend_within_blocks(q, k, v, bias)

    return attend


@torch.compiler.disable  # the mask is a new object in every step: traced, it would recompile every time
def _attend_within_blocks(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
    return _xformers().memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


@lru_cache(maxsize=1)
def _xformers() -> Any:
    """The module xformers.ops, imported without its warning about C++ extensions: torch's kernels do the work here."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    import xformers.ops

    logger.setLevel(level)
    return xformers.ops
