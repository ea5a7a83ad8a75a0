"""MACs of one image's forward pass in training, for reports of speed."""

from __future__ import annotations

from models.config import DPARConfig, GPTConfig
from models.macs import block_macs, dpar_cost, gpt_cost


def gpt_macs(config: GPTConfig, side: int = 1) -> float:
    """MACs of LlamaGen or of the entropy model; with a `side` above 1, of NPP on blocks of side x side tokens."""
    return (gpt_cost(config).forward if side == 1 else block_macs(config, side)).total


def dpar_macs(config: DPARConfig, patches: float) -> float:
    """MACs of DPAR on an image of so many patches, which are rounded to whole ones."""
    whole = min(max(2, round(patches)), config.num_tokens - 1)
    return dpar_cost(config, (config.num_tokens - 1) / whole).forward.total
