"""The rule of `models.patching` for many images: eight tokens at a time, by tables that the rule itself fills.

Whether a token cuts depends on that token alone; the length limit is all that reaches from one token to the next. So
the length of the open patch and the cuts of eight tokens decide which of the eight open patches and how long the open
one is after them: an automaton that reads a byte at a time, for all images at once. Starts come as they are stored, one
bit a token, bit i % 8 of byte i // 8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray

from models.patching import PatchRule, cuts, opens_patch

Bytes = NDArray[np.uint8]
_BYTES = 256


@dataclass(frozen=True)
class PatchTables:
    """A rule for images of one number of tokens.

    Attributes:
        threshold: Of the rule, nats.
        forced: Bits of the tokens that cut whatever their entropy.
        starts: Bits of the tokens that open a patch, for every state and every byte of cuts; None without a length
            limit, where cuts are all there is.
        states: State after them. A state is 256 times one less than the length of the open patch, so that state + byte
            is a place in both tables.
    """

    threshold: np.float32
    forced: Bytes
    starts: Bytes | None
    states: NDArray[np.intp]

    @classmethod
    def of(cls, rule: PatchRule, num_tokens: int) -> PatchTables:
        """Tables of `rule` for images of `num_tokens` tokens."""
        never = torch.full((num_tokens,), -inf)
        forced = pack_bits(cuts(rule, torch.arange(num_tokens), never).numpy())
        threshold = np.float32(rule.threshold)
        if rule.max_length is None or rule.max_length >= num_tokens:
            return cls(threshold, forced, None, np.zeros(0, dtype=np.intp))
        lengths = torch.arange(1, rule.max_length + 1).repeat_interleave(_BYTES)
        bits = unpack_bits(np.arange(_BYTES, dtype=np.uint8)[:, None], 8)
        entropies = torch.where(torch.from_numpy(bits), inf, -inf).repeat(rule.max_length, 1)  # (states * 256, 8)
        free = replace(rule, row_boundary=False)  # rows are among the forced cuts
        opened = []
        for bit in range(8):
            opened.append(opens_patch(free, 2, entropies[:, bit], lengths))  # position 2: the first not forced
            lengths = torch.where(opened[-1], 1, lengths + 1)
        starts = pack_bits(torch.stack(opened, dim=1).numpy())[:, 0]
        return cls(threshold, forced, starts, (_BYTES * (lengths - 1)).numpy().astype(np.intp))

    def packed_starts(self, entropies: NDArray[np.float32]) -> Bytes:
        """Where patches start: the bits of `patch_starts`, (B, T / 8) rounded up, from entropies (B, T) in nats."""
        packed = pack_bits(~(entropies <= self.threshold))
        packed |= self.forced
        return packed if self.starts is None else _walk(packed, self.starts, self.states, entropies.shape[1])


def _walk(cut: Bytes, starts: Bytes, states: NDArray[np.intp], num_tokens: int) -> Bytes:
    """Starts from cuts, byte after byte, all images together."""
    columns = np.ascontiguousarray(cut.T)
    state = np.zeros(len(cut), dtype=np.intp)  # of no account: the first token cuts
    place = np.empty_like(state)
    for column in columns:
        np.add(state, column, out=place)
        # Places are in range; "clip" spares numpy the copy that it makes to leave `out` alone on an error.
        np.take(starts, place, out=column, mode="clip")
        np.take(states, place, out=state, mode="clip")
    columns[-1] &= 0xFF >> -num_tokens % 8  # no token lies there, though the limit may open patches
    return np.ascontiguousarray(columns.T)


def pack_bits(flags: NDArray[np.bool_]) -> Bytes:
    """Flags (..., T) as bits (..., T / 8 rounded up)."""
    return np.packbits(flags, axis=-1, bitorder="little")


def unpack_bits(packed: Bytes, num_tokens: int) -> NDArray[np.bool_]:
    """Flags (..., num_tokens) from bits."""
    return np.unpackbits(packed, axis=-1, count=num_tokens, bitorder="little").view(np.bool_)
