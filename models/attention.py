"""Causal attention of whole sequences, rectangular or packed; kv_cache.py has that of single steps."""

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
    q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T H K"], v: Float[Tensor, "B T H K"]
) -> Float[Tensor, "B T H K"]:
    """Each position attends to itself and those before it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # For this type torch's kernel takes four times as long on a CPU, nearly all of it in the backward pass.
        later = torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        return plain_attention(q, k, v, later).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def plain_attention(
    q: Float[Tensor, "B H Q K"],
    k: Float[Tensor, "B H S K"],
    v: Float[Tensor, "B H S K"],
    hidden: Bool[Tensor, "#B #H #Q S"] | None = None,
) -> Float[Tensor, "B H Q K"]:
    """Attention by its definition, with a float32 softmax; what `hidden` marks is not seen."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, Q, S)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).type_as(v) @ v


def packed_causal_attention(lengths: Sequence[int], device: torch.device) -> Attend:
    """Causal attention inside each sequence of a packed batch (P, H, K), P the sum of `lengths`.

    `lengths` are numbers of the host, so that no step waits for the device. On CUDA xformers attends without padding.
    Elsewhere sequences are padded on the right, where a causal mask hides the padding from every real position.
    """
    return _xformers_attention(lengths, device) if device.type == "cuda" else _padded_attention(lengths, device)


def _padded_attention(lengths: Sequence[int], device: torch.device) -> Attend:
    shape = (len(lengths), max(lengths))
    real = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    places = real.flatten().nonzero()[:, 0].to(device)  # (P,)

    def pad(packed: Tensor) -> Tensor:
        padded = packed.new_zeros(real.numel(), *packed.shape[1:])
        return padded.index_copy(0, places, packed).unflatten(0, shape)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(pad(q), pad(k), pad(v)).flatten(0, 1).index_select(0, places)

    return attend


def _xformers_attention(lengths: Sequence[int], device: torch.device) -> Attend:
    bias = _xformers().fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend_within_blocks(q, k, v, bias)

    return attend


@torch.compiler.disable  # the mask is another object at every step, and looking into it would compile anew each time
def _attend_within_blocks(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
    return _xformers().memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


@lru_cache(maxsize=1)
def _xformers() -> Any:
    """xformers, without its warning about C++ extensions: torch's own kernels do the work here."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    import xformers.ops

    logger.setLevel(level)
    return xformers.ops
