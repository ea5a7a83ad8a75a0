"""Thresholds and what they do: the mean patch length that one gives on stored entropies, and the one that gives it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from models.patch_tables import PatchTables
from models.patching import PatchRule
from stages.runtime.errors import InputError
from stages.stores.entropies import EntropyStore

SAMPLE_ROWS = 65536  # views that are looked at: their mean is known to about 0.1 %
SAMPLE_BLOCK = 4096  # of them at a time, which bounds the memory of intermediate arrays

Entropies = NDArray[np.float32]


@dataclass(frozen=True)
class EntropySample:
    """Entropies (rows, T) of training images in blocks, nats: of all views, or of SAMPLE_ROWS evenly spread ones."""

    blocks: list[Entropies]
    num_tokens: int
    codebook_size: int

    @classmethod
    def of(cls, store: EntropyStore) -> EntropySample:
        """Read them from a store."""
        total = store.num_train * store.num_views
        rows = np.linspace(0, total - 1, min(total, SAMPLE_ROWS)).astype(np.int64)
        return cls.of_array(store.fetch(rows % store.num_train, rows // store.num_train), store.codebook_size)

    @classmethod
    def of_array(cls, entropies: Entropies, codebook_size: int) -> EntropySample:
        """Entropies (rows, T) of training images."""
        blocks = np.split(entropies, range(SAMPLE_BLOCK, len(entropies), SAMPLE_BLOCK))
        return cls(blocks, entropies.shape[1], codebook_size)

    def mean_length(self, rule: PatchRule) -> float:
        """Tokens in a patch, on average over the patches that `rule` makes."""
        mark = PatchTables.of(rule, self.num_tokens).packed_starts
        patches = sum(int(np.bitwise_count(mark(block)).sum()) for block in self.blocks)
        return sum(map(len, self.blocks)) * self.num_tokens / patches

    def share_above(self, threshold: float) -> float:
        """Share of the predicted tokens whose entropy is above `threshold`, which cut by themselves."""
        above = sum(int((block[:, 1:] > np.float32(threshold)).sum()) for block in self.blocks)
        return above / (sum(map(len, self.blocks)) * (self.num_tokens - 1))

    def find_threshold(self, target: float, rule: PatchRule, section: str) -> float:
        """The threshold whose mean patch length comes closest to `target`, by bisection down to neighbouring floats.

        A higher threshold never makes more patches, so bisection holds.

        Args:
            target: Tokens in a patch.
            rule: What else opens patches; its threshold is not read.
            section: Of the settings that ask, for the error.

        Raises:
            InputError: No threshold gives it.
        """

        def mean_length(threshold: float) -> float:
            return self.mean_length(replace(rule, threshold=threshold))

        # Entropies lie between these; what predicts them may leave the range.
        low = min(0.0, *(float(block[:, 1:].min()) for block in self.blocks))
        high = max(float(np.float32(math.log(self.codebook_size))), *(float(block.max()) for block in self.blocks))
        shortest, longest = mean_length(low), mean_length(high)
        if not shortest <= target <= longest:
            raise InputError(
                f"{section}.target_mean_length is {target}, expected {shortest:.4f} to {longest:.4f}: what these "
                f"entropies allow with max_length {rule.max_length} and row_boundary {rule.row_boundary}"
            )
        while (middle := float(np.float32((low + high) / 2))) not in (low, high):
            if mean_length(middle) < target:
                low = middle
            else:
                high = middle
        return min(low, high, key=lambda threshold: abs(mean_length(threshold) - target))
