"""Token batches for Next Patch Prediction, and the loss of a GPT on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from models.config import NextPatchSchedule
from models.gpt import GPT
from models.npp import next_patch_loss
from stages.runtime.arrays import Indices
from stages.runtime.distributed import World
from stages.training.data import LossAndScalars, TokenBatch, TokenData
from stages.training.stream import SampleStream


@dataclass(frozen=True)
class NextPatchBatch(TokenBatch):
    """A batch whose loss is over blocks of `side` x `side` tokens."""

    side: int


@dataclass(frozen=True)
class NextPatchData(TokenData):
    """Batches from tokens, and the schedule of block sizes over `steps` steps."""

    schedule: NextPatchSchedule
    steps: int

    def training_batch(self, stream: SampleStream, step: int, world: World) -> NextPatchBatch:
        """This process's share of a step, with the block size of that step."""
        plain = super().training_batch(stream, step, world)
        return NextPatchBatch(plain.tokens, plain.labels, self.schedule.side(step, self.steps))

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
