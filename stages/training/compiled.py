"""Compilation of transformer blocks with torch.compile."""

from __future__ import annotations

from torch import nn

from models.layers import Block


def compile_blocks(model: nn.Module) -> None:
    """Compile every transformer block of `model` in place, for dynamic shapes. Names of weights do not change.

    Only blocks are compiled: they do nearly all of the work, and one compiled block serves all layers of a stack. The
    code around them depends on the patches of a batch and would be recompiled for each batch.
    """
    for block in model.modules():
        if isinstance(block, Block):
            block.compile(dynamic=True)
