"""Transformer blocks compiled by torch.compile, one by one."""

from __future__ import annotations

import warnings

from torch import nn

from models.layers import Block


def compile_blocks(model: nn.Module) -> None:
    """Compile every transformer block of `model` in place, for shapes that change; names of weights stay.

    Only the blocks: they are nearly all of the work, and one compiled block serves all layers of a stack. What lies
    around them depends on how a batch is cut into patches, and would be compiled anew for each batch.
    """
    # Rotary products of complex numbers stay torch's own kernels, which is fast: nothing to warn of.
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex operators")
    for block in model.modules():
        if isinstance(block, Block):
            block.compile(dynamic=True)
