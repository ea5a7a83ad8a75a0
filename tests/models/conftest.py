"""Small models with weights far from their initial values, and the way around the shape checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from models.config import DPARConfig, GPTConfig
from models.dpar import DPAR
from models.gpt import GPT

Model = TypeVar("Model", bound=nn.Module)
Rough = Callable[[Model], Model]


def _rough(model: Model) -> Model:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def rough() -> Rough[Any]:
    """Gives a model other weights, far from their initial values: fresh heads are zero and hide what goes wrong."""
    return _rough


@pytest.fixture(scope="session")
def dpar() -> Callable[..., DPAR]:
    """Builds a rough DPAR of two layers a stack for 4 x 4 tokens of 40 codes and 5 classes; keywords change it."""

    def build(**changes: Any) -> DPAR:
        size = {"dim": 64, "num_heads": 4, "encoder_layers": 2, "global_layers": 2, "decoder_layers": 2}
        return _rough(DPAR(DPARConfig(**size | {"codebook_size": 40, "num_tokens": 16, "num_classes": 5} | changes)))

    return build


@pytest.fixture(scope="session")
def gpt() -> Callable[..., GPT]:
    """Builds a rough GPT of two layers for the same images; without classes it is an entropy model."""

    def build(num_classes: int | None, **changes: Any) -> GPT:
        size = {"dim": 32, "num_layers": 2, "num_heads": 2, "codebook_size": 40, "num_tokens": 16}
        return _rough(GPT(GPTConfig(**size | changes, num_classes=num_classes)))

    return build
