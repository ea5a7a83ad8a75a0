"""Entropies of a DPAR model's own predictions of known tokens."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.boundaries import GivenBoundaries, NextTokens
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
    recorded = _Recorded(starts.to(tokens.device), math.log(model.config.codebook_size))
    uniforms = torch.zeros(tokens.shape, device=tokens.device)
    sample_dpar(model, labels, uniforms, SamplingOptions(), recorded, prefix=tokens)
    return recorded.entropies


class _Recorded(GivenBoundaries):
    """Given boundaries that record the model's own entropies."""

    reads_logits = True

    def __init__(self, starts: Bool[Tensor, "B T"], first: float) -> None:
        super().__init__(starts)
        self.entropies = torch.full(starts.shape, first, device=starts.device)

    def opens(self, tokens: NextTokens) -> Bool[Tensor, " R"]:
        """Record the entropies and return the given starts of these tokens."""
        assert tokens.logits is not None
        continued = tokens.open_lengths > 0  # else the patch opens here, and the logits are of the new one
        images, positions = tokens.images[continued], tokens.positions[continued]
        self.entropies[images, positions] = token_entropy(tokens.logits[continued])
        return super().opens(tokens)
