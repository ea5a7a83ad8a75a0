"""A model's own uncertainty about known tokens, each predicted as if it opened no patch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.boundaries import GivenBoundaries, NextToken
from models.dpar import DPAR
from models.gpt import token_entropy
from models.sampling import sample_dpar
from models.token_sampling import SamplingOptions


def own_entropies(model: DPAR, tokens: Tensor, labels: Tensor, starts: Tensor) -> Tensor:
    """Entropies (B, T) of the model's own predictions of known tokens, each as if it opened no patch, nats."""
    recorded = _Recorded(starts.to(tokens.device))
    uniforms = torch.zeros(tokens.shape, device=tokens.device)
    sample_dpar(model, labels, uniforms, SamplingOptions(), recorded, prefix=tokens)
    first = torch.full_like(recorded.entropies[0], math.log(model.config.codebook_size))
    return torch.stack([first, *recorded.entropies], dim=1)


class _Recorded:
    """Given boundaries that record the model's own entropies."""

    def __init__(self, starts: Tensor) -> None:
        self._given, self.entropies = GivenBoundaries(starts), list[Tensor]()

    def begin(self, batch: int, num_tokens: int) -> None:
        """Start a batch of images."""
        self._given.begin(batch, num_tokens)

    def opens(self, token: NextToken) -> Tensor:
        """The given answer."""
        self.entropies.append(token_entropy(token.open_logits()))
        return self._given.opens(token)
