"""Activation checkpointing: blocks whose activations are computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.layers import Block
from models.vq import AttnBlock, ResBlock


def recompute_blocks(model: nn.Module) -> None:
    """Keep only the inputs of each block of `model` for the backward pass. Gradients stay equal to the bit.

    The second pass has the random state of the first, so its dropout is the same. Names of weights do not change.
    """
    for block in model.modules():
        if isinstance(block, (Block, ResBlock, AttnBlock)):
            block.forward = _recomputed(block.forward)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        if not torch.is_grad_enabled():  # held-out losses keep nothing anyway
            return forward(*given)
        return checkpoint(forward, *given, use_reentrant=False, preserve_rng_state=True)

    return run
