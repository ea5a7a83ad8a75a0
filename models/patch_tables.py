"""The rule of patching.py for many images, eight tokens at a time, by lookup tables that the rule itself fills.

Whether a token cuts depends on that token alone. Only the length limit depends on earlier tokens. So the length of the
open patch and the cuts of eight tokens determine which of the eight open patches, and the length of the patch that is
open after them. This is an automaton that reads one byte of cuts at a time, for all images at once. Starts are packed
as they are stored: one bit a token, bit i % 8 of byte i // 8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, UInt8
from numpy.typing import NDArray

from models.patching import PatchRule, cuts, opens_patch

Bytes = NDArray[np.uint8]
_BYTES = 256


@dataclass(frozen=True)
class PatchTables:
    """A rule for images of one number of tokens.

    Attributes:
        threshold: The rule's threshold, nats.
        forced: Bits of the tokens that cut at any entropy, (ceil(T / 8),).
        starts: Bits of the tokens that open a patch, for every state and every byte of cuts, (256 * max_length,). None
            without a length limit: then every start is a cut.
        states: State after the eight tokens, same index as `starts`. A state is 256 * (length of the open patch - 1),
            so that state + byte is the index.
    """

    threshold: np.float32
    forced: UInt8[np.ndarray, " bytes"]
    starts: UInt8[np.ndarray, " states"] | None
    states: Int[np.ndarray, " states"]

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
        free = replace(rule, row_boundary=False)  # row boundaries are among the forced cuts
        opened = []
        for bit in range(8):
            second = torch.full_like(lengths, 2)  # a position that is not forced
            opened.append(opens_patch(free, second, entropies[:, bit], lengths))
            lengths = torch.where(opened[-1], 1, lengths + 1)
        starts = pack_bits(torch.stack(opened, dim=1).numpy())[:, 0]
        return cls(threshold, forced, starts, (_BYTES * (lengths - 1)).numpy().astype(np.intp))

    def packed_starts(self, entropies: Float32[np.ndarray, "B T"]) -> UInt8[np.ndarray, "B bytes"]:
        """Bits of `patch_starts`, (B, ceil(T / 8)), from entropies in nats."""
        packed = pack_bits(~(entropies <= self.threshold))
        packed |= self.forced
        return packed if self.starts is None else _walk(packed, self.starts, self.states, entropies.shape[1])


def _walk(
    cut: UInt8[np.ndarray, "B bytes"],
    starts: UInt8[np.ndarray, " states"],
    states: Int[np.ndarray, " states"],
    num_tokens: int,
) -> UInt8[np.ndarray, "B bytes"]:
    """Bits of starts from bits of cuts: byte after byte, all images at once."""
    columns = np.ascontiguousarray(cut.T)
    state = np.zeros(len(cut), dtype=np.intp)  # any value: the first token cuts
    place = np.empty_like(state)
    for column in columns:
        np.add(state, column, out=place)
        # Indices are in range. The mode "clip" avoids the copy that numpy makes to protect `out` from errors.
        np.take(starts, place, out=column, mode="clip")
        np.take(states, place, out=state, mode="clip")
    columns[-1] &= 0xFF >> -num_tokens % 8  # there are no tokens, but the length limit may set bits
    return np.ascontiguousarray(columns.T)


def pack_bits(flags: Bool[np.ndarray, "*B T"]) -> UInt8[np.ndarray, "*B bytes"]:
    """Flags as bits, ceil(T / 8) bytes a row, the last one padded with zeros."""
    return np.packbits(flags, axis=-1, bitorder="little")


def unpack_bits(packed: UInt8[np.ndarray, "*B bytes"], num_tokens: int) -> Bool[np.ndarray, "*B T"]:
    """The first `num_tokens` flags of each row of bits."""
    return np.unpackbits(packed, axis=-1, count=num_tokens, bitorder="little").view(np.bool_)
