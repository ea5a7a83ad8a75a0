"""LlamaGen's transformer over VQ tokens, and its unconditional twin, the entropy model.

Conditional: the sequence is [class, x_0, ..., x_{T-2}], and position j predicts x_j. Unconditional: the sequence is
[x_0, ..., x_{T-2}], and position j predicts x_{j+1}; nothing predicts x_0.

Source: LlamaGen (arXiv 2406.06525), section 2.2; DPAR, section 3.1 for the entropy model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.attention import causal_attention
from models.config import GPTConfig
from models.kv_cache import KVCache
from models.layers import Block, LabelEmbedder, RMSNorm, check_tokens, grid_rope, init_weights
from models.loss import head_cross_entropy

_SLICE_LOGITS = 2**24  # 64 MB in float32: enough rows for fast matrix products


class GPT(nn.Module):
    """Decoder-only transformer. The output head starts at zero, so the first loss is ln(codebook size) exactly."""

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
        """Whether a class position comes first."""
        return self.config.num_classes is not None

    def forward(self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B S V"]:
        """Logits of the predicted tokens, float32: S = T with a class and T - 1 without."""
        return self.output(self.features(tokens, labels)).float()

    def features(self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B S D"]:
        """What the head makes the logits from. The last token is read by no one."""
        if tokens.shape[1] != self.config.num_tokens:
            raise ValueError(f"{tokens.shape[1]} tokens an image, the model was made for {self.config.num_tokens}")
        if self.conditional != (labels is not None):
            raise ValueError(f"labels are {labels}, expected them exactly when the model has classes")
        check_tokens(tokens, self.config.codebook_size)
        return self.transform(self.tok_embeddings(tokens[:, :-1]), labels, self.config.grid)

    def transform(
        self, embedded: Float[Tensor, "B N D"], labels: Int[Tensor, " B"] | None, grid: int
    ) -> Float[Tensor, "B S D"]:
        """Features after the class, if there is one, and after each of the first N embeddings of a `grid` x `grid`."""
        if labels is not None:
            embedded = torch.cat([self.cls_embedding(labels)[:, None], embedded], dim=1)
        hidden = self.tok_dropout(embedded)  # (B, S, D)
        rope = self._rope(grid, hidden.device)[: hidden.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, rope, causal_attention)
        return self.norm(hidden)

    def loss(self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"] | None = None) -> Float[Tensor, ""]:
        """Mean cross-entropy of the predicted tokens, nats."""
        targets = tokens if self.conditional else tokens[:, 1:]
        features = self.features(tokens, labels).flatten(0, 1)
        return head_cross_entropy(features, self.output.weight, targets.reshape(-1, 1))

    def entropy(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Entropy of each token given those before it, nats, float32. Of the unconditional model.

        The first token has no prediction: its entry is ln(codebook size), and the patch rule never reads it. Logits
        exist for a slice of the positions at a time: all those of a batch would take more memory than the model.
        """
        features = self.features(tokens)
        rows = features.flatten(0, 1).split(max(1, _SLICE_LOGITS // self.config.codebook_size))
        entropies = torch.cat([token_entropy(self.output(part)) for part in rows]).unflatten(0, features.shape[:2])
        first = torch.full((len(tokens), 1), math.log(self.config.codebook_size), device=tokens.device)
        return torch.cat([first, entropies], dim=1)

    def new_cache(self) -> KVCache:
        """An empty cache for `step`."""
        return KVCache(len(self.layers), self.config.num_tokens)

    def step(self, hidden: Float[Tensor, "B D"], position: int, cache: KVCache) -> Float[Tensor, "B V"]:
        """Logits after one more position, whose embedding is `hidden`."""
        rope = self._rope(self.config.grid, hidden.device)[position]
        for layer, attend in zip(self.layers, cache.step(position), strict=True):
            hidden = layer(hidden, rope, attend)
        return self.output(self.norm(hidden)).float()

    def _rope(self, grid: int, device: torch.device) -> Float[Tensor, "L R 2"]:
        head_dim = self.config.dim // self.config.num_heads
        return grid_rope(grid, head_dim, device, class_row=self.conditional)


def token_entropy(logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """Entropy of each distribution, nats, in float32 whatever the logits are: it is compared with a threshold."""
    log_probs = F.log_softmax(logits.float(), dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)
