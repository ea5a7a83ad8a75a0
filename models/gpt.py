"""LlamaGen's transformer over VQ tokens, and its unconditional variant, the entropy model.

Conditional: the sequence is [class, x_0, ..., x_{T-2}], and position j predicts x_j. Unconditional: the sequence is
[x_0, ..., x_{T-2}], and position j predicts x_{j+1}. Nothing predicts x_0. The last token is never an input.

Source: LlamaGen (arXiv 2406.06525), section 2.2; DPAR (arXiv 2512.21867), section 3.1, for the entropy model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.attention import causal_attention
from models.config import GPTConfig
from models.layers import Block, LabelEmbedder, RMSNorm, check_tokens, grid_rope, init_weights
from models.loss import head_cross_entropy

_SLICE_LOGITS = 2**24  # 64 MiB in float32, with enough rows for fast matrix products


class GPT(nn.Module):
    """Decoder-only transformer. The output head starts at zero, so the first loss is exactly ln(codebook size)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        if config.num_classes is not None:
            self.cls_embedding = LabelEmbedder(config.num_classes, config.dim, config.class_dropout_prob)
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.dim)
        self.tok_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            Block(config.dim, config.num_heads, config.dropout) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, config.codebook_size, bias=False)
        self.apply(init_weights)
        nn.init.zeros_(self.output.weight)

    @property
    def conditional(self) -> bool:
        """Whether the sequence starts with a class position."""
        return self.config.num_classes is not None

    def forward(self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B S V"]:
        """Logits of the predicted tokens, float32. S is T with classes and T - 1 without.

        Raises:
            ValueError: See `features`.
        """
        return self.output(self.features(tokens, labels)).float()

    def features(self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B S D"]:
        """Normed output of the last layer, the input of the head.

        Raises:
            ValueError: The number of tokens is not the model's, a token is outside the codebook, or labels are given to
                an unconditional model or missing for a conditional one.
        """
        if tokens.shape[1] != self.config.num_tokens:
            raise ValueError(f"{tokens.shape[1]} tokens an image, the model is for {self.config.num_tokens}")
        if self.conditional != (labels is not None):
            raise ValueError(f"labels are {labels}, expected them exactly when the model has classes")
        check_tokens(tokens, self.config.codebook_size)
        return self.transform(self.tok_embeddings(tokens[:, :-1]), labels, self.config.grid)

    def transform(
        self, embedded: Float[Tensor, "B M D"], labels: Int[Tensor, " B"] | None, grid: int
    ) -> Float[Tensor, "B S D"]:
        """Features of the class position, if there are labels, and of M embeddings.

        The embeddings are those of the first M cells of a `grid` x `grid`, in raster order. S is M, plus one for the
        class.
        """
        if labels is not None:
            embedded = torch.cat([self.cls_embedding(labels)[:, None], embedded], dim=1)
        hidden = self.tok_dropout(embedded)  # (B, S, D)
        rope = self.rope(grid, hidden.device)[: hidden.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, rope, causal_attention)
        return self.norm(hidden)

    def loss(self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"] | None = None) -> Float[Tensor, ""]:
        """Mean cross-entropy of the predicted tokens, nats.

        Raises:
            ValueError: See `features`.
        """
        targets = tokens if self.conditional else tokens[:, 1:]
        features = self.features(tokens, labels).flatten(0, 1)
        return head_cross_entropy(features, self.output.weight, targets.reshape(-1, 1))

    def entropy(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Entropy of each token given those before it, nats, float32. The model must be unconditional.

        The first token has no prediction: its entry is ln(codebook size), and the patch rule ignores it. Logits are
        computed for a slice of the positions at a time: those of a whole batch would take more memory than the model.

        Raises:
            ValueError: See `features`.
        """
        entropies = self.entropies_after(self.features(tokens))
        first = torch.full((len(tokens), 1), math.log(self.config.codebook_size), device=tokens.device)
        return torch.cat([first, entropies], dim=1)

    def entropies_after(self, features: Float[Tensor, "B S D"]) -> Float[Tensor, "B S"]:
        """Entropy of the token after each position, nats, float32, from the features there."""
        rows = features.flatten(0, 1).split(max(1, _SLICE_LOGITS // self.config.codebook_size))
        return torch.cat([token_entropy(self.output(part)) for part in rows]).unflatten(0, features.shape[:2])

    def rope(self, grid: int, device: torch.device) -> Float[Tensor, "S F 2"]:
        """Rotations of the class position, if there are classes, and of the cells of a `grid` x `grid`."""
        head_dim = self.config.dim // self.config.num_heads
        return grid_rope(grid, head_dim, device, class_row=self.conditional)


def token_entropy(logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """Entropy of each distribution, nats.

    Computed in float32 whatever the dtype of `logits`, because the result is compared with a threshold.

    Source: BLT (arXiv 2412.09871), section 2.3; DPAR (arXiv 2512.21867), section 3.1.
    """
    log_probs = F.log_softmax(logits.float(), dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)
