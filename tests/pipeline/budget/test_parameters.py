"""Closed forms of the numbers of parameters against the real modules."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import nn

from models.config import DPAR_SIZES, GPT_SIZES, DPARConfig, DPARSize, GPTConfig, GPTSize, VQConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.vq import VQModel
from pipeline.budget.parameters import transformer_parameters, vq_parameters
from pipeline.budget.shape import TokenShape

TOKENS = TokenShape(codebook_size=16384, num_tokens=256, num_classes=1000)


def number(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("size", [GPT_SIZES["T"], GPT_SIZES["B"]])
@pytest.mark.parametrize("conditional", [False, True])
def test_gpt(size: GPTSize, conditional: bool) -> None:
    config = asdict(size) | asdict(TOKENS) | ({} if conditional else {"num_classes": None})
    with torch.device("meta"):
        module = GPT(GPTConfig(**config))
    assert transformer_parameters(size, TOKENS, conditional=conditional) == number(module)


@pytest.mark.parametrize("size", [DPAR_SIZES["B"], DPAR_SIZES["L-E4D1"]])
def test_dpar(size: DPARSize) -> None:
    with torch.device("meta"):
        module = DPAR(DPARConfig(**asdict(size), **asdict(TOKENS)))
    assert transformer_parameters(size, TOKENS, conditional=True) == number(module)


@pytest.mark.parametrize(
    "config",
    [
        VQConfig(),
        VQConfig(channel_multipliers=(1, 2, 2, 4)),
        VQConfig(channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1, z_channels=32, codebook_size=64),
    ],
)
def test_vq(config: VQConfig) -> None:
    with torch.device("meta"):
        module = VQModel(config)
    assert vq_parameters(config) == number(module)
