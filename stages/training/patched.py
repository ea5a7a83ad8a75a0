"""Batches of tokens with their patches, and the loss of a DPAR on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from models.dpar import DPAR
from models.packed_patches import PackedPatches, pack_patches
from stages.stores.patches import PatchIndex
from stages.training.data import TokenBatch, TokenData
from stages.training.stream import Integers


@dataclass(frozen=True)
class PatchedBatch(TokenBatch):
    """A batch whose tokens are merged into patches."""

    patches: PackedPatches

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same batch with each tensor changed."""
        return replace(super().map(change), patches=self.patches.map(change))


@dataclass(frozen=True)
class PatchedData(TokenData):
    """Tokens beside a patch index of the same store."""

    index: PatchIndex

    @property
    def digests(self) -> dict[str, str]:
        """Digest of each thing that batches are made from."""
        return super().digests | {"patches": self.index.digest}

    def batch(self, images: Integers, views: Integers) -> PatchedBatch:
        """Tokens, labels and patches of the given images and views. The patches are laid out here, on the CPU."""
        plain = super().batch(images, views)
        patches = pack_patches(torch.from_numpy(self.index.starts(images, views)))
        return PatchedBatch(plain.tokens, plain.labels, patches)


class DPARObjective(nn.Module):
    """Mean cross-entropy of a batch, nats."""

    def __init__(self, model: DPAR) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PatchedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and nothing else to log."""
        batch = batch.to(next(self.model.parameters()).device)
        return self.model.loss(batch.tokens, batch.labels, batch.patches), {}
