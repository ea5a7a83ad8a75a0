"""The entropy of the next token, told by what DPAR's encoder knows already instead of by an entropy model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.config import EntropyHeadKind
from models.layers import RMSNorm, init_weights


class EntropyHead(nn.Module):
    """Encoder states to entropies: a norm, for an MLP one hidden layer of the same width, and a weighted sum.

    Entropies lie between 0 and that of guessing, ln(codebook size); at first all are in the middle.
    """

    def __init__(self, kind: EntropyHeadKind, dim: int, codebook_size: int) -> None:
        super().__init__()
        self.shape = {"kind": kind, "dim": dim, "codebook_size": codebook_size}
        self._largest = math.log(codebook_size)
        self.norm = RMSNorm(dim)
        self.hidden = nn.Linear(dim, dim, bias=False) if kind == "mlp" else None
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(()))
        self.apply(init_weights)

    def forward(self, states: Float[Tensor, "*B D"]) -> Float[Tensor, "*B"]:
        """Entropy of the token after each state's own, nats, float32."""
        x = self.norm(states)
        if self.hidden is not None:
            x = F.silu(self.hidden(x))
        # A matrix product would be done in bfloat16 under autocast, and entropies are compared with a threshold.
        scores = (x.float() * self.weight.float()).sum(dim=-1) + self.bias.float()
        return self._largest * scores.sigmoid()
