"""Token batches, training on them, and the loss of a GPT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from conf.section import TrainingConfig
from models.gpt import GPT
from stages.runtime.arrays import Indices
from stages.runtime.distributed import World
from stages.stores.tokens import TokenStore
from stages.training.loop import Training
from stages.training.stream import SampleStream
from stages.training.validation import heldout_loss

LossAndScalars = tuple[Float[Tensor, ""], dict[str, Tensor]]
"""Loss of a batch, and named scalars to log."""
Batch = TypeVar("Batch", bound="TokenBatch")


@dataclass(frozen=True)
class TokenBatch:
    """One process's share of a step."""

    tokens: Int[Tensor, "B T"]
    labels: Int[Tensor, " B"]

    def to(self: Batch, device: torch.device) -> Batch:
        """The same batch on `device`. Copies from pinned memory are asynchronous."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `change` applied to each tensor."""
        return replace(self, tokens=change(self.tokens), labels=change(self.labels))


class GPTObjective(nn.Module):
    """Mean cross-entropy of a batch, nats. Labels are used if the model is class-conditional."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> LossAndScalars:
        """The loss. There are no other scalars to log."""
        batch = batch.to(next(self.model.parameters()).device)
        return self.model.loss(batch.tokens, batch.labels if self.model.conditional else None), {}


@dataclass(frozen=True)
class TokenData:
    """Batches from the tokens of a finished `tokenize` artifact."""

    store: TokenStore

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the data that batches are made from, by name."""
        return {"tokens": self.store.digest}

    def training(
        self,
        model: nn.Module,
        objective: nn.Module,
        config: TrainingConfig,
        seed: int,
        world: World,
        *,
        restarts: tuple[int, ...] = (),
        auxiliary: Mapping[str, nn.Module] | None = None,
    ) -> Training[TokenBatch]:
        """Training run of `model` on these batches, validated by the held-out loss; see `Training`."""
        stream = SampleStream(self.store.num_train, config.global_batch_size, seed)
        return Training(
            model=model,
            objective=objective,
            batch=lambda step: self.training_batch(stream, step, world),
            data_state=lambda steps: stream.state(steps) | self.digests,
            validate=lambda: heldout_loss(self, objective, world),
            config=config,
            seed=seed,
            restarts=restarts,
            auxiliary=auxiliary or {},
        )

    def training_batch(self, stream: SampleStream, step: int, world: World) -> TokenBatch:
        """This process's share of a step, with a random view of each image; in pinned memory if the device is a GPU."""
        images, epochs = stream.rank_slice(step, world)
        batch = self.batch(images, stream.views(images, epochs, self.store.num_views))
        return batch.map(Tensor.pin_memory) if world.device.type == "cuda" else batch

    def batch(self, images: Indices, views: Indices) -> TokenBatch:
        """Tokens and labels of the given images and views."""
        tokens = torch.from_numpy(self.store.fetch(images, views).astype(np.int64))
        return TokenBatch(tokens, torch.from_numpy(self.store.labels[images].astype(np.int64)))
