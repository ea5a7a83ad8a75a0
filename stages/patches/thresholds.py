"""Mean patch length for a threshold on stored entropies, and the threshold for a mean patch length."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from models.patch_tables import PatchTables
from models.patching import PatchRule
from stages.runtime.arrays import Entropies
from stages.runtime.errors import InputError
from stages.stores.entropies import EntropyStore

SAMPLE_ROWS = 65536  # views evaluated at most: enough for a mean patch length to about 0.1 %
SAMPLE_BLOCK = 4096  # views at a time: bounds the memory of intermediate arrays


@dataclass(frozen=True)
class EntropySample:
    """Entropies of training images, nats: of all views, or of SAMPLE_ROWS evenly spread ones.

    Attributes:
        blocks: Entropies of at most SAMPLE_BLOCK views each.
        num_tokens: T.
        codebook_size: V; the logarithm of V is the largest possible entropy.
    """

    blocks: list[Float32[NDArray[np.float32], "_ T"]]
    num_tokens: int
    codebook_size: int

    @classmethod
    def of(cls, store: EntropyStore) -> EntropySample:
        """Read the sample from a store."""
        total = store.num_train * store.num_views
        rows = np.linspace(0, total - 1, min(total, SAMPLE_ROWS)).astype(np.int64)
        return cls.of_array(store.fetch(rows % store.num_train, rows // store.num_train), store.codebook_size)

    @classmethod
    def of_array(cls, entropies: Entropies, codebook_size: int) -> EntropySample:
        """Cut entropies of training images into blocks."""
        blocks = np.split(entropies, range(SAMPLE_BLOCK, len(entropies), SAMPLE_BLOCK))
        return cls(blocks, entropies.shape[1], codebook_size)

    def mean_length(self, rule: PatchRule) -> float:
        """Tokens per patch, averaged over the patches that `rule` opens."""
        mark = PatchTables.of(rule, self.num_tokens).packed_starts
        patches = sum(int(np.bitwise_count(mark(block)).sum()) for block in self.blocks)
        return sum(map(len, self.blocks)) * self.num_tokens / patches

    def share_above(self, threshold: float) -> float:
        """Share of the predicted tokens whose entropy is above `threshold`; such a token always opens a patch."""
        above = sum(int((block[:, 1:] > np.float32(threshold)).sum()) for block in self.blocks)
        return above / (sum(map(len, self.blocks)) * (self.num_tokens - 1))

    def find_threshold(self, target: float, rule: PatchRule, section: str) -> float:
        """Threshold in nats whose mean patch length is closest to `target`.

        Bisection down to neighbouring float32 numbers is valid, because a higher threshold never gives a shorter mean.

        Args:
            target: Mean patch length, tokens.
            rule: Length limit and row boundaries; its threshold is not read.
            section: Section of the settings that holds the target, for the error message.

        Raises:
            InputError: The target is out of reach for any threshold.
        """

        def mean_length(threshold: float) -> float:
            return self.mean_length(replace(rule, threshold=threshold))

        # Entropies lie in [0, log V], but a regression head may leave this range.
        low = min(0.0, *(float(block[:, 1:].min()) for block in self.blocks))
        high = max(float(np.float32(math.log(self.codebook_size))), *(float(block.max()) for block in self.blocks))
        shortest, longest = mean_length(low), mean_length(high)
        if not shortest <= target <= longest:
            raise InputError(
                f"{section}.target_mean_length is {target}, expected {shortest:.4f} to {longest:.4f}: the range "
                f"of these entropies with max_length {rule.max_length} and row_boundary {rule.row_boundary}"
            )
        while (middle := float(np.float32((low + high) / 2))) not in (low, high):
            if mean_length(middle) < target:
                low = middle
            else:
                high = middle
        return min(low, high, key=lambda threshold: abs(mean_length(threshold) - target))
