"""AdamW and its learning rate schedule. Source: paper, supplement, table S9."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:  # `dpar bench gpu` runs on machines without pydantic
    from conf.section import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and embeddings, none on norms and biases."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate(step: int, config: TrainingConfig, restarts: Sequence[int] = ()) -> float:
    """Learning rate of optimiser step `step`, counted from 0: linear warm-up, then `config.decay`.

    The decay is constant, a cosine to zero, or NPP's linear tail (constant, then linear to a tenth over the last
    fifth; its published warm-up begins with a step at rate 0). The schedule starts again at each step in `restarts`.
    """
    first = max((start for start in restarts if start <= step), default=0)
    steps = min((start for start in restarts if start > step), default=config.steps) - first
    step -= first
    if step < config.warmup_steps:
        done = step if config.decay == "linear_tail" else step + 1
        return config.learning_rate * done / config.warmup_steps
    if config.decay == "cosine":
        progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if config.decay == "linear_tail":
        tail = max(config.warmup_steps, 0.8 * steps)
        return config.learning_rate * (1 - 0.9 * max(0.0, step - tail) / (steps - tail))
    return config.learning_rate
