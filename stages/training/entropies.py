"""Token batches with entropies, and losses of an entropy head on the states of a model's encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.dpar import DPAR
from models.entropy_head import EntropyHead
from stages.runtime.arrays import Indices
from stages.stores.entropies import EntropyStore
from stages.training.data import LossAndScalars
from stages.training.patched import PatchedBatch, PatchedData, dpar_token_losses

Batch = TypeVar("Batch", bound="EntropyBatch")


@dataclass(frozen=True)
class EntropyBatch(PatchedBatch):
    """A batch with its patches and the entropy of each token given those before it, nats."""

    entropies: Float[Tensor, "B T"]

    def map(self: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `change` applied to each tensor."""
        return replace(super().map(change), entropies=change(self.entropies))


@dataclass(frozen=True)
class EntropyData(PatchedData):
    """Batches from tokens, and the patch index and entropies of the same tokens."""

    entropies: EntropyStore

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the data that batches are made from, by name."""
        return super().digests | {"entropies": self.entropies.digest}

    def batch(self, images: Indices, views: Indices) -> EntropyBatch:
        """Tokens, labels, patches and entropies of the given images and views."""
        plain = super().batch(images, views)
        entropies = torch.from_numpy(self.entropies.fetch(images, views))
        return EntropyBatch(plain.tokens, plain.labels, plain.patches, entropies)


class HeadObjective(nn.Module):
    """Mean squared error of a head on the states of a frozen model, nats squared."""

    def __init__(self, model: DPAR, head: EntropyHead) -> None:
        super().__init__()
        self.model, self.head = model.requires_grad_(requires_grad=False), head

    def train(self, mode: bool = True) -> HeadObjective:
        """Switch only the head to training mode: the frozen model never applies dropout."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, batch: EntropyBatch) -> LossAndScalars:
        """The loss. There are no other scalars to log."""
        here = batch.to(next(self.head.parameters()).device)
        with torch.no_grad():
            states = self.model.token_states(here.tokens[:, :-1])
        return F.mse_loss(self.head(states), here.entropies[:, 1:]), {}


class JointObjective(nn.Module):
    """Cross-entropy of a batch plus the weighted mean squared error of a head on the states of the same forward pass.

    With `stop_gradient`, the head's error has no gradient in the encoder. In evaluation mode the loss is the
    cross-entropy alone, so held-out losses compare with those of a model without a head.
    """

    def __init__(self, model: DPAR, head: EntropyHead, weight: float, *, stop_gradient: bool) -> None:
        super().__init__()
        self.model, self.head, self.weight, self.stop_gradient = model, head, weight, stop_gradient

    def forward(self, batch: EntropyBatch) -> LossAndScalars:
        """The loss and its two parts."""
        here = batch.to(next(self.model.parameters()).device)
        token_loss, states = self.model.loss_and_states(here.tokens, here.labels, here.patches)
        found = self.head(states.detach() if self.stop_gradient else states)
        error = F.mse_loss(found, here.entropies[:, 1:])
        loss = token_loss + self.weight * error if self.training else token_loss
        return loss, {"token_loss": token_loss.detach(), "entropy_error": error.detach()}

    def token_losses(self, batch: EntropyBatch) -> Float[Tensor, "B T"]:
        """Cross-entropy of each token, nats."""
        return dpar_token_losses(self.model, batch)
