"""Batches of tokens with their entropies, and the loss of a head that reads these off a finished model's encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.dpar import DPAR
from models.entropy_head import EntropyHead
from stages.stores.entropies import EntropyStore
from stages.training.data import TokenBatch, TokenData
from stages.training.stream import Integers


@dataclass(frozen=True)
class EntropyBatch(TokenBatch):
    """A batch with the entropy of each token given those before it, nats."""

    entropies: Float[Tensor, "B T"]

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same batch with each tensor changed."""
        return replace(super().map(change), entropies=change(self.entropies))


@dataclass(frozen=True)
class EntropyData(TokenData):
    """Tokens beside the entropies of the same store."""

    entropies: EntropyStore

    @property
    def digests(self) -> dict[str, str]:
        """Digest of each thing that batches are made from."""
        return super().digests | {"entropies": self.entropies.digest}

    def batch(self, images: Integers, views: Integers) -> EntropyBatch:
        """Tokens, labels and entropies of the given images and views."""
        plain = super().batch(images, views)
        return EntropyBatch(plain.tokens, plain.labels, torch.from_numpy(self.entropies.fetch(images, views)))


class HeadObjective(nn.Module):
    """Mean squared error of a head on the states of a model that stays as it is, nats squared."""

    def __init__(self, model: DPAR, head: EntropyHead) -> None:
        super().__init__()
        self.model, self.head = model.requires_grad_(requires_grad=False), head

    def train(self, mode: bool = True) -> Self:
        """Only the head learns: the model drops nothing out, now or when it is asked afterwards."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, batch: EntropyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and nothing else to log."""
        here = batch.to(next(self.head.parameters()).device)
        with torch.no_grad():
            states = self.model.token_states(here.tokens[:, :-1])
        return F.mse_loss(self.head(states), here.entropies[:, 1:]), {}
