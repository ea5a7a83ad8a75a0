"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Averages of a model's trained weights, float32 like the weights: a <- decay * a + (1 - decay) * weight per step.

    Averages start at the model's initial weights, as in LlamaGen. Buffers are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._blend = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Add the weights of a finished step."""
        self._blend(list(self._averages.values()), [weight.detach() for weight in self._weights.values()], 0)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the averages with the model's weights. A second call restores both, bit for bit."""
        for name, weight in self._weights.items():
            kept = weight.detach().clone()
            weight.copy_(self._averages[name])
            self._averages[name].copy_(kept)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Context in which the model holds the averages."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name."""
        return self._averages

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore saved averages."""
        for name, average in self._averages.items():
            average.copy_(state[name])
