"""Entropies of a DPAR model's own predictions of known tokens."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.boundaries import GivenBoundaries, NextToken
from models.dpar import DPAR
from models.gpt import token_entropy
from models.sampling import sample_dpar
from models.token_sampling import SamplingOptions


def own_entropies(
    model: DPAR, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"], starts: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Entropy of the model's prediction of each token, as if the token opened no patch, in nats.

    The first token has no prediction: its entry is the logarithm of the codebook size.
    """
    recorded = _Recorded(starts.to(tokens.device))
    uniforms = torch.zeros(tokens.shape, device=tokens.device)
    sample_dpar(model, labels, uniforms, SamplingOptions(), recorded, prefix=tokens)
    first = torch.full_like(recorded.entropies[0], math.log(model.config.codebook_size))
    return torch.stack([first, *recorded.entropies], dim=1)


class _Recorded:
    """Given boundaries that record the model's own entropies."""

    def __init__(self, starts: Bool[Tensor, "B T"]) -> None:
        self._given, self.entropies = GivenBoundaries(starts), list[Tensor]()

    def begin(self, batch: int, num_tokens: int) -> None:
        """Start a batch of images."""
        self._given.begin(batch, num_tokens)

    def opens(self, token: NextToken) -> Bool[Tensor, " R"]:
        """Record the entropy and return the given starts of this token."""
        self.entropies.append(token_entropy(token.open_logits()))
        return self._given.opens(token)
