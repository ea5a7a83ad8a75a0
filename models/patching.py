"""Where patches start: one rule, applied to stored entropies and while sampling.

A token opens a patch when the entropy model was uncertain about it, when it begins a row of the token grid, or when the
open patch is full. Tokens 0 and 1 always open one. Source: DPAR, section 3.2 and Algorithm 1.
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
        threshold: Nats. Compared as float32, because entropies are stored so.
        max_length: Longest patch in tokens, or None.
        row_boundary: Whether every row of the grid opens a patch.
        grid: Tokens along one side of the image.
    """

    threshold: float
    max_length: int | None
    row_boundary: bool
    grid: int


def cuts(rule: PatchRule, positions: Int[Tensor, "*#B"], entropies: Float[Tensor, "*B"]) -> Bool[Tensor, "*B"]:
    """Where a patch starts whatever came before: by entropy, by row, or as one of the first two tokens.

    Not `entropy > threshold` but its contrary: an entropy that is no number cuts.
    """
    threshold = torch.tensor(rule.threshold, dtype=torch.float32, device=entropies.device)
    cut = ~(entropies.float() <= threshold) | (positions < 2)
    return cut | (positions % rule.grid == 0) if rule.row_boundary else cut


def opens_patch(
    rule: PatchRule, position: int, entropies: Float[Tensor, " B"], open_lengths: Int[Tensor, " B"]
) -> Bool[Tensor, " B"]:
    """Whether the token at `position` opens a patch, given the entropy about it and the length of the open patch."""
    positions = torch.full_like(open_lengths, position)
    opened = cuts(rule, positions, entropies)
    return opened if rule.max_length is None else opened | (open_lengths >= rule.max_length)


def patch_starts(rule: PatchRule, entropies: Float[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Where patches start in every image: `opens_patch` for all positions at once.

    Between two cuts the length limit starts a patch every `max_length` tokens, counted from the first cut.
    """
    positions = torch.arange(entropies.shape[1], device=entropies.device)
    cut = cuts(rule, positions, entropies)
    if rule.max_length is None:
        return cut
    last_cut = torch.where(cut, positions, 0).cummax(dim=1).values
    return (positions - last_cut) % rule.max_length == 0


def static_patch_starts(length: float, num_tokens: int) -> Bool[Tensor, " T"]:
    """Starts of patches of one, possibly fractional, length: token i lies in patch floor(i / length)."""
    patch = torch.floor(torch.arange(num_tokens, dtype=torch.float64) / length).long()
    return torch.cat([torch.ones(1, dtype=torch.bool), patch.diff() > 0])
