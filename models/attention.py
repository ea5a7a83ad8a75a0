"""Causal attention in the three layouts that occur: rectangular, packed, and one step against a cache."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from models.layers import Attend


def causal_attention(
    q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T H K"], v: Float[Tensor, "B T H K"]
) -> Float[Tensor, "B T H K"]:
    """Each position attends to itself and those before it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class PackedCausalAttention:
    """Causal attention inside each sequence of a packed batch (P, H, K), P the sum of `lengths`.

    `lengths` are numbers of the host, so that no step waits for the device. On CUDA xformers attends without padding;
    elsewhere the sequences are padded on the right, where a causal mask hides the padding from every real position.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.device = device
        if device.type != "cuda":
            longest = max(self.lengths)
            sizes = torch.tensor(self.lengths, device=device)
            rows = torch.arange(len(self.lengths), device=device).repeat_interleave(sizes)
            first = torch.cumsum(sizes, 0) - sizes
            columns = torch.arange(len(rows), device=device) - first[rows]
            self._padded_places = rows * longest + columns  # (P,)

    def __call__(
        self, q: Float[Tensor, "P H K"], k: Float[Tensor, "P H K"], v: Float[Tensor, "P H K"]
    ) -> Float[Tensor, "P H K"]:
        """Attended values, packed as the inputs are."""
        if self.device.type == "cuda":
            return _xformers_attention(q, k, v, self.lengths)
        padded = causal_attention(self._pad(q), self._pad(k), self._pad(v))
        return padded.flatten(0, 1)[self._padded_places]

    def _pad(self, packed: Float[Tensor, "P H K"]) -> Float[Tensor, "B M H K"]:
        shape = (len(self.lengths), max(self.lengths))
        padded = packed.new_zeros(shape[0] * shape[1], *packed.shape[1:])
        return padded.index_copy(0, self._padded_places, packed).unflatten(0, shape)


class KVCache:
    """Keys and values of one layer for B sequences of at most `capacity` positions, filled one position at a time."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def step(self, position: int) -> Attend:
        """Attention of the one new position of all sequences to everything up to it."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._storage(k, len(k))  # (B, H, C, K)
            keys[:, :, position], values[:, :, position] = k, v
            filled = slice(position + 1)
            return F.scaled_dot_product_attention(q[:, :, None], keys[:, :, filled], values[:, :, filled])[:, :, 0]

        return attend

    def ragged_step(self, batch: int, rows: Int[Tensor, " R"], positions: Int[Tensor, " R"], filled: int) -> Attend:
        """Attention of a new position of some sequences, each at its own position below `filled`."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._storage(k, batch)
            keys[rows, :, positions], values[rows, :, positions] = k, v
            seen = torch.arange(filled, device=k.device) <= positions[:, None]  # (R, filled)
            attended = F.scaled_dot_product_attention(
                q[:, :, None], keys[rows, :, :filled], values[rows, :, :filled], attn_mask=seen[:, None, None]
            )
            return attended[:, :, 0]

        return attend

    def _storage(self, like: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Allocated at the first step, in the type that attention computes in. Zeros: what is masked must be finite."""
        if self._keys is None or self._values is None:
            heads, width = like.shape[-2:]
            self._keys = like.new_zeros(batch, heads, self._capacity, width)
            self._values = torch.zeros_like(self._keys)
        return self._keys, self._values


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    ops = _xformers()
    bias = ops.fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths)
    return ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


@lru_cache(maxsize=1)
def _xformers() -> Any:
    """xformers, without its warning about C++ extensions that packed attention does not use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import xformers.ops
    return xformers.ops
