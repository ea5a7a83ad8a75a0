"""Token batches for Next Patch Prediction, and the loss of a GPT on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.config import NextPatchSchedule
from models.gpt import GPT
from models.npp import next_patch_loss
from stages.runtime.arrays import Indices
from stages.training.costs import gpt_macs
from stages.training.data import LossAndScalars, TokenBatch, TokenData
from stages.training.stream import Part, SampleStream
from stages.training.validation import token_losses


@dataclass(frozen=True)
class NextPatchBatch(TokenBatch):
    """A batch whose loss is over blocks of `side` x `side` tokens."""

    side: int


@dataclass(frozen=True)
class NextPatchData(TokenData):
    """Batches from tokens, and the schedule of block sizes over `steps` steps."""

    schedule: NextPatchSchedule
    steps: int

    def training_batch(self, stream: SampleStream, step: int, part: Part, device: torch.device) -> NextPatchBatch:
        """A micro-batch of a step, with the block size of that step."""
        plain = super().training_batch(stream, step, part, device)
        return NextPatchBatch(plain.tokens, plain.labels, self.schedule.side(step, self.steps))

    def macs(self, model: nn.Module, step: int, counts: Mapping[str, float]) -> float | None:
        """MACs of one image's forward pass at a step, with the block size of that step."""
        return gpt_macs(model.config, self.schedule.side(step, self.steps)) if isinstance(model, GPT) else None

    def batch(self, images: Indices, views: Indices) -> NextPatchBatch:
        """Tokens and labels of the given images and views, in blocks of one token: held-out losses are LlamaGen's."""
        plain = super().batch(images, views)
        return NextPatchBatch(plain.tokens, plain.labels, side=1)


class NextPatchObjective(nn.Module):
    """Mean cross-entropy of a batch over its blocks, nats."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: NextPatchBatch) -> LossAndScalars:
        """The loss, and the side of the blocks. With blocks of one token, the loss is bit-identical to LlamaGen's."""
        here = batch.to(next(self.model.parameters()).device)
        if batch.side == 1:
            loss = self.model.loss(here.tokens, here.labels)
        else:
            loss = next_patch_loss(self.model, here.tokens, here.labels, batch.side)
        return loss, {"patch_side": torch.tensor(float(batch.side))}

    def token_losses(self, batch: NextPatchBatch) -> Float[Tensor, "B S"]:
        """Cross-entropy of each token in blocks of one token, nats."""
        here = batch.to(next(self.model.parameters()).device)
        return token_losses(self.model.features(here.tokens, here.labels), self.model.output, here.tokens)
