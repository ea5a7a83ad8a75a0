"""Sizes of the models that are measured: those of the papers, and `tiny`, which is for trying a script out.

The codebook of `tiny` is small too, so models of this size go together with no others.
"""

from __future__ import annotations

from models.config import DPAR_SIZES, GPT_SIZES, DPARSize

_TINY = DPARSize(dim=64, num_heads=2, encoder_layers=1, global_layers=1, decoder_layers=1)
DPARS = DPAR_SIZES | {"tiny": _TINY}
GPTS = GPT_SIZES | {"tiny": _TINY.as_gpt()}
BOTH = sorted(DPARS.keys() & GPTS.keys())
"""Sizes at which DPAR has a LlamaGen to be compared with."""


def codebook_size(size: str) -> int:
    """Codes that a model of this size knows."""
    return 64 if size == "tiny" else 16384
