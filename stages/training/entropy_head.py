"""An entropy head that learns from stored entropies: together with its model, or alone on a finished one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.dpar import DPAR
from models.entropy_head import EntropyHead
from stages.distributed import World, all_reduce_sum
from stages.stores.entropies import EntropyStore
from stages.training.patched import PatchedBatch, PatchedData
from stages.training.stream import Integers

Predict = Callable[[Int[Tensor, "B T"]], Float[Tensor, "B S"]]
"""Tokens to the entropies of all but the first of them."""


@dataclass(frozen=True)
class EntropyBatch(PatchedBatch):
    """A batch with the entropy of each of its tokens."""

    entropies: Float[Tensor, "B T"]

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same batch with each tensor changed."""
        return replace(super().map(change), entropies=change(self.entropies))


@dataclass(frozen=True)
class EntropyData(PatchedData):
    """Tokens and patches beside the entropies that the patches were made from."""

    entropies: EntropyStore

    @property
    def digests(self) -> dict[str, str]:
        """Digest of each thing that batches are made from."""
        return super().digests | {"entropies": self.entropies.digest}

    def batch(self, images: Integers, views: Integers) -> EntropyBatch:
        """Tokens, labels, patches and entropies of the given images and views."""
        plain = super().batch(images, views)
        entropies = torch.from_numpy(self.entropies.fetch(images, views))
        return EntropyBatch(plain.tokens, plain.labels, plain.patches, entropies)

    def heldout_fit(self, predict: Predict, world: World, batch_size: int = 128) -> dict[str, float]:
        """How predicted entropies fit those of the first view of the held-out images; empty when none are held out.

        Correlation is Pearson's over all tokens but the first of an image; the error is the mean square, nats squared.
        """
        rows = np.arange(self.store.num_train, len(self.store))
        if not len(rows):
            return {}
        total = torch.zeros(6, dtype=torch.float64)
        for first in range(world.rank * batch_size, len(rows), world.size * batch_size):
            images = rows[first : first + batch_size]
            tokens = torch.from_numpy(self.store.fetch(images, np.zeros_like(images)).astype(np.int64))
            found = predict(tokens.to(world.device)).double().cpu()
            wanted = torch.from_numpy(self.entropies.fetch(images, np.zeros_like(images)))[:, 1:].double()
            total += torch.stack([_count(found), found.sum(), wanted.sum(), *_squares(found, wanted)])
        count, *sums = all_reduce_sum(total.to(world.device)).tolist()
        found_mean, wanted_mean, found_square, wanted_square, product = (value / count for value in sums)
        spread = (found_square - found_mean**2) * (wanted_square - wanted_mean**2)
        return {
            "heldout_entropy_correlation": (product - found_mean * wanted_mean) / max(spread, 1e-30) ** 0.5,
            "heldout_entropy_error": found_square - 2 * product + wanted_square,
        }


class JointObjective(nn.Module):
    """Cross-entropy of the tokens plus the squared error of the head's entropies.

    The head's error reaches the encoder with the weight `encoder_gradient`; at 0 the model learns as without a head.
    """

    def __init__(self, model: DPAR, encoder_gradient: float) -> None:
        super().__init__()
        self.model, self._encoder_gradient = model, encoder_gradient

    def forward(self, batch: EntropyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its two parts, nats and nats squared."""
        assert self.model.entropy_head is not None
        batch = batch.to(next(self.model.parameters()).device)
        states, features = self.model.states_and_features(batch.tokens, batch.labels, batch.patches)
        loss = self.model.token_loss(features, batch.tokens)
        cut_off = states.detach()
        reached = cut_off if self._encoder_gradient == 0 else cut_off + self._encoder_gradient * (states - cut_off)
        error = F.mse_loss(self.model.entropy_head(reached), batch.entropies[:, 1:])
        return loss + error, {"token_loss": loss.detach(), "entropy_error": error.detach()}


class FrozenObjective(nn.Module):
    """Squared error of the entropies of a head on a finished model, of which only the encoder runs."""

    def __init__(self, model: DPAR, head: EntropyHead) -> None:
        super().__init__()
        self.model, self.head = model.requires_grad_(requires_grad=False), head

    def forward(self, batch: EntropyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, nats squared, and nothing else to log."""
        device = self.head.weight.device
        predicted = self.head(self.model.encoder_states(batch.tokens.to(device)))
        return F.mse_loss(predicted, batch.entropies[:, 1:].to(device)), {}


def predict_with(head: EntropyHead, model: DPAR) -> Predict:
    """The head's entropies."""
    return lambda tokens: head(model.encoder_states(tokens))


def _count(values: Tensor) -> Tensor:
    return torch.tensor(values.numel(), dtype=torch.float64)


def _squares(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return first.square().sum(), second.square().sum(), (first * second).sum()
