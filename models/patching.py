"""The patch rule: where patches start. One rule for stored entropies and for sampling.

A token opens a patch if its entropy exceeds the threshold, if it begins a row of the token grid, or if the open patch
is full. Tokens 0 and 1 always open a patch.

Source: DPAR (arXiv 2512.21867), section 3.2 and Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class PatchRule:
    """The settings of Algorithm 1.

    Attributes:
        threshold: Nats. Compared in float32, the dtype of stored entropies.
        max_length: Longest patch, in tokens; None without a limit.
        row_boundary: Whether the first token of every row opens a patch.
        grid: Tokens along one side of the image.
    """

    threshold: float
    max_length: int | None
    row_boundary: bool
    grid: int

    @property
    def longest(self) -> int:
        """Length of the longest patch that is possible, in tokens."""
        limits = [self.grid**2, *([self.grid] if self.row_boundary else [])]
        return min(limits if self.max_length is None else [*limits, self.max_length])


def cuts(rule: PatchRule, positions: Int[Tensor, "*#B"], entropies: Float[Tensor, "*B"]) -> Bool[Tensor, "*B"]:
    """Cuts: tokens that open a patch whatever the open patch is, by entropy, by row, or as token 0 or 1.

    The comparison is `not entropy <= threshold`, so that a NaN entropy cuts too. Torch rounds the threshold to the
    dtype of the entropies. It stays a Python number: copying it to a GPU would force a sync at every token.
    """
    cut = ~(entropies.float() <= rule.threshold) | (positions < 2)
    return cut | (positions % rule.grid == 0) if rule.row_boundary else cut


def opens_patch(
    rule: PatchRule, positions: Int[Tensor, " R"], entropies: Float[Tensor, " R"], open_lengths: Int[Tensor, " R"]
) -> Bool[Tensor, " R"]:
    """Whether each token opens a patch, from its position, its entropy in nats and the tokens in the open patch."""
    opened = cuts(rule, positions, entropies)
    return opened if rule.max_length is None else opened | (open_lengths >= rule.max_length)


def patch_starts(rule: PatchRule, entropies: Float[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Where patches start, from entropies in nats: `opens_patch` for all positions at once.

    Between two cuts the length limit starts a patch every `max_length` tokens, counted from the first of the two.
    """
    positions = torch.arange(entropies.shape[1], device=entropies.device)
    cut = cuts(rule, positions, entropies)
    if rule.max_length is None:
        return cut
    last_cut = torch.where(cut, positions, 0).cummax(dim=1).values
    return (positions - last_cut) % rule.max_length == 0


def static_patch_starts(length: float, num_tokens: int) -> Bool[Tensor, " T"]:
    """Starts of patches of one length in tokens, not necessarily whole: token i is in patch floor(i / length)."""
    patch = torch.floor(torch.arange(num_tokens, dtype=torch.float64) / length).long()
    return torch.cat([torch.ones(1, dtype=torch.bool), patch.diff() > 0])
