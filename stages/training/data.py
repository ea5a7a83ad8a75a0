"""Token batches, training on them, and the loss of a GPT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from conf.section import TrainingConfig
from models.gpt import GPT
from stages.runtime.arrays import Indices
from stages.runtime.distributed import World
from stages.stores.tokens import TokenStore
from stages.training.costs import gpt_macs
from stages.training.loop import Preview, Training
from stages.training.stream import Part, SampleStream
from stages.training.validation import heldout_loss, token_losses

LossAndScalars = tuple[Float[Tensor, ""], dict[str, Tensor]]
"""Loss of a batch, and named scalars to log."""
Batch = TypeVar("Batch", bound="TokenBatch")


@dataclass(frozen=True)
class TokenBatch:
    """The images of a micro-batch."""

    tokens: Int[Tensor, "B T"]
    labels: Int[Tensor, " B"]

    def to(self: Batch, device: torch.device) -> Batch:
        """The same batch on `device`. Copies from pinned memory are asynchronous."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `change` applied to each tensor."""
        return replace(self, tokens=change(self.tokens), labels=change(self.labels))

    def counts(self) -> dict[str, int]:
        """Number of tokens."""
        return {"tokens": self.tokens.numel()}


@runtime_checkable
class HasTokenLosses(Protocol):
    """An objective that also gives the loss of each position."""

    def token_losses(self, batch: Any) -> Tensor:
        """Cross-entropy of the last S positions of a batch (B, S), nats."""


class GPTObjective(nn.Module):
    """Mean cross-entropy of a batch, nats. Labels are used if the model is class-conditional."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> LossAndScalars:
        """The loss. There are no other scalars to log."""
        batch = batch.to(next(self.model.parameters()).device)
        return self.model.loss(batch.tokens, batch.labels if self.model.conditional else None), {}

    def token_losses(self, batch: TokenBatch) -> Float[Tensor, "B S"]:
        """Cross-entropy of each token that the model predicts, nats."""
        here = batch.to(next(self.model.parameters()).device)
        features = self.model.features(here.tokens, here.labels if self.model.conditional else None)
        return token_losses(features, self.model.output, here.tokens)


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
        preview: Preview | None = None,
    ) -> Training[Any]:
        """Training run of `model` on these batches, validated by the held-out loss; see `Training`."""
        stream = SampleStream(self.store.num_train, config.global_batch_size, seed)
        return Training(
            model=model,
            objective=objective,
            batch=lambda step, part: self.training_batch(stream, step, part, world.device),
            samples=lambda step, part: self.samples(stream, step, part),
            counts=lambda batch: batch.counts(),
            macs=lambda step, counts: self.macs(model, step, counts),
            data_state=lambda steps: stream.state(steps) | self.digests,
            validate=lambda: heldout_loss(self, objective, world),
            config=config,
            seed=seed,
            restarts=restarts,
            auxiliary=auxiliary or {},
            preview=preview,
        )

    def training_batch(self, stream: SampleStream, step: int, part: Part, device: torch.device) -> TokenBatch:
        """A micro-batch of a step, with a random view of each image; in pinned memory if the device is a GPU."""
        images, epochs = stream.samples(step, part)
        batch = self.batch(images, stream.views(images, epochs, self.store.num_views))
        return batch.map(Tensor.pin_memory) if device.type == "cuda" else batch

    def samples(self, stream: SampleStream, step: int, part: Part) -> dict[str, list[int]]:
        """Numbers of the images of a micro-batch, with the epoch and the view of each."""
        images, epochs = stream.samples(step, part)
        views = stream.views(images, epochs, self.store.num_views)
        return {"images": images.tolist(), "epochs": epochs.tolist(), "views": views.tolist()}

    def macs(self, model: nn.Module, step: int, counts: Mapping[str, float]) -> float | None:
        """MACs of one image's forward pass at a step in which batches had these counts; None where unknown."""
        return gpt_macs(model.config) if isinstance(model, GPT) else None

    def batch(self, images: Indices, views: Indices) -> TokenBatch:
        """Tokens and labels of the given images and views."""
        tokens = torch.from_numpy(self.store.fetch(images, views).astype(np.int64))
        return TokenBatch(tokens, torch.from_numpy(self.store.labels[images].astype(np.int64)))
