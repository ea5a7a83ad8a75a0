"""Model sizes of the benchmarks: those of the papers, and `tiny` for tests.

The codebook of `tiny` is small too: combine `tiny` models only with each other.
"""

from __future__ import annotations

from models.config import DPAR_SIZES, GPT_SIZES, DPARSize

_TINY = DPARSize(dim=64, num_heads=2, encoder_layers=1, global_layers=1, decoder_layers=1)
DPARS = DPAR_SIZES | {"tiny": _TINY}
GPTS = GPT_SIZES | {"tiny": _TINY.as_gpt()}
BOTH = sorted(DPARS.keys() & GPTS.keys())
"""Sizes that both DPAR and LlamaGen have."""


def codebook_size(size: str) -> int:
    """Number of codes of a model of this size."""
    return 64 if size == "tiny" else 16384
