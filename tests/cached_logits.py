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


class Known(Canvas):
    """Images whose tokens are known. Keeps the guided logits of every token."""

    def __init__(self, known: Tensor, labels: Tensor, options: SamplingOptions, model: DPAR) -> None:
        super().__init__(labels, torch.zeros(known.shape), options, model.config.num_classes, None)
        self.known = torch.nn.functional.pad(known, (0, 0, 0, 1))
        self.logits = torch.full((*self.known.shape, model.config.codebook_size), torch.nan)

    def draw(self, logits: Tensor, images: Tensor, positions: Tensor) -> Tensor:
        self.logits[images, positions] = self._guided(logits, positions)
        tokens = self.tokens[images, positions] = self.known[images, positions]
        return tokens


def cached_logits(
    model: DPAR, tokens: Tensor, labels: Tensor, boundaries: Boundaries, options: SamplingOptions, batch: int
) -> Tensor:
    """Logits of every token (N, T, V) from the steps of the sampler, token by token."""
    canvas = Known(tokens, labels, options, model)
    Sampling(canvas, DPARSteps, model, boundaries, batch=batch).finish()
    return canvas.logits[:-1]
