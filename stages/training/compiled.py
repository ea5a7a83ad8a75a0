"""Compilation of transformer blocks with torch.compile."""

from __future__ import annotations

import logging
import os
import shutil

import torch
from torch import nn

from models.layers import Block
from stages.runtime.errors import InputError

logger = logging.getLogger(__name__)
_COMPILERS = ("c++", "g++", "clang++")


def compile_blocks(model: nn.Module) -> None:
    """Compile every transformer block of `model` in place, for dynamic shapes. Names of weights do not change.

    Only blocks are compiled: they do nearly all of the work, and one compiled block serves all layers of a stack. The
    code around them depends on the patches of a batch and would be recompiled for each batch.
    """
    torch._dynamo.config.specialize_float = True  # ours are constants; as variables they double the time of compiling
    for block in model.modules():
        if isinstance(block, Block):
            # Not block.compile(), whose compiled code would include what `recomputed` puts around the forward pass.
            block.forward = torch.compile(block.forward, dynamic=True)  # type: ignore[method-assign]


def compile_as_set(model: nn.Module, wanted: bool | None, device: torch.device) -> None:
    """Compile the blocks of `model` if `is_compiled` says so; warn where a GPU is slower than it could be.

    Raises:
        InputError: See `is_compiled`.
    """
    if is_compiled(wanted, device):
        compile_blocks(model)
    elif wanted is None and device.type == "cuda":
        logger.warning("training is not compiled, because there is no C++ compiler: install g++ for faster steps")


def is_compiled(wanted: bool | None, device: torch.device) -> bool:
    """Whether to compile: the setting, or if it is None, whether the device is a GPU and there is a compiler.

    Raises:
        InputError: The setting is true and there is no compiler.
    """
    if wanted is None:
        return device.type == "cuda" and _has_compiler()
    if wanted and not _has_compiler():
        raise InputError("runtime.compile is true and there is no C++ compiler: install g++, or set it to false")
    return wanted


def _has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler. On CUDA, Triton builds its launchers with one too."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), *_COMPILERS) if name)
