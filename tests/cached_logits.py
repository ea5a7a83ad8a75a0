"""Logits of known tokens, as the steps of the sampler make them."""

from __future__ import annotations

import torch
from torch import Tensor

from models.boundaries import Boundaries
from models.canvas import Canvas
from models.dpar import DPAR
from models.dpar_steps import DPARSteps
from models.sampling import Sampling
from models.token_sampling import SamplingOptions


class Recorded(Canvas):
    """Keeps the guided logits of every token."""

    logits: Tensor | None = None

    def draw(self, logits: Tensor, images: Tensor, positions: Tensor) -> Tensor:
        guided = self._guided(logits, positions)
        if self.logits is None:
            self.logits = guided.new_full((self.num_images + 1, self.num_tokens, guided.shape[1]), torch.nan)
        self.logits[images, positions] = guided
        return super().draw(logits, images, positions)


def cached_logits(
    model: DPAR, tokens: Tensor, labels: Tensor, boundaries: Boundaries, options: SamplingOptions, batch: int
) -> Tensor:
    """Logits of every token (N, T, V). The sampler takes all tokens from a prefix."""
    canvas = Recorded(labels, torch.zeros(tokens.shape), options, model.config.num_classes, tokens)
    found = Sampling(canvas, DPARSteps, model, boundaries, batch=batch).finish()
    assert torch.equal(found.tokens, tokens)
    assert canvas.logits is not None
    return canvas.logits[:-1]
