"""Token batches with patches, and the loss of a DPAR model on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.dpar import DPAR
from models.packed_patches import PackedPatches, pack_patches
from stages.runtime.arrays import Indices
from stages.stores.patches import PatchIndex
from stages.training.costs import dpar_macs
from stages.training.data import LossAndScalars, TokenBatch, TokenData
from stages.training.validation import token_losses

Batch = TypeVar("Batch", bound="PatchedBatch")


@dataclass(frozen=True)
class PatchedBatch(TokenBatch):
    """A batch whose tokens are merged into patches."""

    patches: PackedPatches

    def map(self: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `change` applied to each tensor."""
        return replace(super().map(change), patches=self.patches.map(change))

    def counts(self) -> dict[str, int]:
        """Number of tokens, and of patches that the global stack reads."""
        return super().counts() | {"patches": len(self.patches.first)}


@dataclass(frozen=True)
class PatchedData(TokenData):
    """Batches from tokens and the patch index of the same tokens."""

    index: PatchIndex

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the data that batches are made from, by name."""
        return super().digests | {"patches": self.index.digest}

    def batch(self, images: Indices, views: Indices) -> PatchedBatch:
        """Tokens, labels and patches of the given images and views. Patches are packed here, on the CPU."""
        plain = super().batch(images, views)
        patches = pack_patches(torch.from_numpy(self.index.starts(images, views)))
        return PatchedBatch(plain.tokens, plain.labels, patches)

    def macs(self, model: nn.Module, step: int, counts: Mapping[str, float]) -> float | None:
        """MACs of one image's forward pass with the mean number of patches; None where unknown."""
        return dpar_macs(model.config, counts["patches"] / counts["images"]) if isinstance(model, DPAR) else None


class DPARObjective(nn.Module):
    """Mean cross-entropy of a batch, nats."""

    def __init__(self, model: DPAR) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PatchedBatch) -> LossAndScalars:
        """The loss. There are no other scalars to log."""
        batch = batch.to(next(self.model.parameters()).device)
        return self.model.loss(batch.tokens, batch.labels, batch.patches), {}

    def token_losses(self, batch: PatchedBatch) -> Float[Tensor, "B T"]:
        """Cross-entropy of each token, nats."""
        return dpar_token_losses(self.model, batch)


def dpar_token_losses(model: DPAR, batch: PatchedBatch) -> Float[Tensor, "B T"]:
    """Cross-entropy of each token of a batch, nats."""
    here = batch.to(next(model.parameters()).device)
    return token_losses(model.features(here.tokens, here.labels, here.patches), model.output, here.tokens)
