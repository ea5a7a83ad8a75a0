"""Entropy head: predicts the entropy of the next token from DPAR's encoder, so that sampling needs no entropy model.

When a boundary must be decided, the encoder has already read all tokens before it. Its states alone carry little of the
entropy, because the model predicts tokens from states and global context together. A linear head or a small MLP is
therefore much less accurate than a narrow causal block.

This head is not part of the DPAR paper.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.attention import causal_attention
from models.config import EntropyHeadConfig
from models.dpar import DPAR
from models.layers import Attend, Block, RMSNorm, grid_rope, init_weights


class EntropyHead(nn.Module):
    """Maps the encoder's state of each token to the entropy of the next token, in nats."""

    def __init__(self, config: EntropyHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = RMSNorm(config.dim)
        width = config.dim
        if config.kind != "linear":
            width = config.width
            self.narrow = nn.Linear(config.dim, width, bias=False)
        if config.kind == "block":
            self.block = Block(width, config.num_heads, dropout=0.0)
        if config.kind != "linear":
            self.output_norm = RMSNorm(width)
        self.output = nn.Linear(width, 1, bias=False)
        self.mean = nn.Parameter(torch.tensor(math.log(config.codebook_size) / 2))
        self.apply(init_weights)
        nn.init.zeros_(self.output.weight)

    def forward(self, states: Float[Tensor, "B S D"]) -> Float[Tensor, "B S"]:
        """Entropies, nats, float32. The state of token i gives the entropy of token i + 1."""
        return self.predict(states, self.rope(states.device)[: states.shape[1]], causal_attention)

    def predict(
        self, states: Float[Tensor, "*N D"], rope: Float[Tensor, "... F 2"], attend: Attend
    ) -> Float[Tensor, "*N"]:
        """Entropies after the positions whose states and rotations are given."""
        hidden = self.norm(states)
        if self.config.kind == "mlp":
            hidden = self.output_norm(F.silu(self.narrow(hidden)))
        elif self.config.kind == "block":
            hidden = self.output_norm(self.block(self.narrow(hidden), rope, attend))
        return self.output(hidden)[..., 0].float() + self.mean.float()

    def rope(self, device: torch.device) -> Float[Tensor, "T F 2"]:
        """Rotations of all tokens."""
        return grid_rope(self.config.grid, self.config.width // self.config.num_heads, device, class_row=False)


def entropies_of(model: DPAR, head: EntropyHead, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Entropy of each token given those before it, nats, float32.

    The first token has no prediction: its entry is ln(codebook size), the entropy of the uniform distribution.
    """
    found = head(model.token_states(tokens[:, :-1]))
    first = torch.full_like(found[:, :1], math.log(model.config.codebook_size))
    return torch.cat([first, found], dim=1)
