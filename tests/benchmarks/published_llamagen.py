"""A training step and a sampling step of LlamaGen as they were published: what ours are compared with.

Written anew from the published model's operations, in their order, where ours differ: norms round before their weight,
queries and keys are rotated separately by products and a stack, heads of keys and values are repeated, and the float32
logits of the whole batch go through the plain cross-entropy. A sampling step attends to the whole cache, and a mask
hides what is not filled. Names of weights are the same, so that both start alike.

Source: LlamaGen (arXiv 2406.06525) and its released training code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import GPTConfig
from models.gpt import GPT
from models.layers import FeedForward, LabelEmbedder, grid_rope

LEARNING_RATE, BETAS, WEIGHT_DECAY, GRAD_CLIP = 1e-4, (0.9, 0.95), 0.05, 1.0


class Norm(nn.Module):
    """RMSNorm: by its formula in float32, cast back, times the weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised features."""
        wide = x.float()
        normed = wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + 1e-5)
        return normed.type_as(x) * self.weight


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Attended features (B, S, D)."""
        batch, length, dim = x.shape
        q, k, v = (part.view(batch, length, self.num_heads, -1) for part in self.wqkv(x).split(dim, dim=-1))
        q, k, v = (part.transpose(1, 2) for part in (rotated(q, rope), rotated(k, rope), v))
        k, v = k.repeat_interleave(1, dim=1), v.repeat_interleave(1, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.resid_dropout(self.wo(mixed.transpose(1, 2).contiguous().view(batch, length, dim)))


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """Pairs of channels of (B, S, H, K), turned by angles whose cosines and sines are (S, K / 2, 2)."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    table = rope.view(1, pairs.size(1), 1, pairs.size(3), 2)
    turned = torch.stack(
        [
            pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1],
            pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1],
        ],
        dim=-1,
    )
    return turned.flatten(3).type_as(x)


class Block(nn.Module):
    """Transformer block. The feed-forward layer is ours: there is only one way to write it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention = Attention(config.dim, config.num_heads, config.dropout)
        self.feed_forward = FeedForward(config.dim, config.dropout)
        self.attention_norm, self.ffn_norm = Norm(config.dim), Norm(config.dim)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Features after attention and feed-forward."""
        hidden = x + self.attention(self.attention_norm(x), rope)
        return hidden + self.feed_forward(self.ffn_norm(hidden))


class PublishedLlamaGen(nn.Module):
    """The class-conditional transformer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.num_classes is not None
        self.config = config
        self.cls_embedding = LabelEmbedder(config.num_classes, config.dim, config.class_dropout_prob)
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.dim)
        self.tok_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = Norm(config.dim)
        self.output = nn.Linear(config.dim, config.codebook_size, bias=False)

    @classmethod
    def like(cls, model: GPT) -> PublishedLlamaGen:
        """The same weights."""
        twin = cls(model.config)
        twin.load_state_dict(model.state_dict())
        return twin

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, nats."""
        embedded = torch.cat([self.cls_embedding(labels)[:, None], self.tok_embeddings(tokens[:, :-1])], dim=1)
        hidden = self.tok_dropout(embedded)
        head_dim = self.config.dim // self.config.num_heads
        rope = grid_rope(self.config.grid, head_dim, tokens.device, class_row=True)[: tokens.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, rope)
        logits = self.output(self.norm(hidden)).float()
        return F.cross_entropy(logits.view(-1, logits.size(-1)), tokens.reshape(-1))


def published_step(model: PublishedLlamaGen, tokens: Tensor, labels: Tensor, *, bfloat16: bool) -> Callable[[], object]:
    """One optimiser step: autocast, backward pass, clipping, fused AdamW, gradients set to None."""
    trained = list(model.train().parameters())
    groups = [
        {"params": [weight for weight in trained if weight.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [weight for weight in trained if weight.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model.loss(tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class PublishedSampler:
    """Guided sampling of a batch, a token of each image at every step."""

    def __init__(self, model: PublishedLlamaGen, batch: int, cfg_scale: float) -> None:
        self.batch, self.repeats, self.parts = batch, 1, dict[str, float]()
        self._model, self._scale = model, cfg_scale
        c = model.config
        self._labels = torch.cat([torch.arange(batch), torch.full((batch,), c.num_classes)])
        self._rope = grid_rope(c.grid, c.dim // c.num_heads, torch.device("cpu"), class_row=True)
        length = -(-(c.num_tokens + 1) // 8) * 8
        shape = (c.num_layers, 2, 2 * batch, c.num_heads, length, c.dim // c.num_heads)
        self._cache = torch.zeros(shape, dtype=model.output.weight.dtype)
        self._mask = torch.tril(torch.ones(length, length, dtype=torch.bool))
        self._last: Tensor | None = None
        self.position = 0

    def step(self) -> None:
        """Draw the next token of all images."""
        model = self._model
        if self._last is None:
            hidden = model.cls_embedding(self._labels)[:, None]
        else:
            hidden = model.tok_embeddings(torch.cat([self._last, self._last]))
        place = torch.tensor([self.position])
        for layer, cached in zip(model.layers, self._cache, strict=True):
            hidden = hidden + self._attend(layer.attention, layer.attention_norm(hidden), place, cached)
            hidden = hidden + layer.feed_forward(layer.ffn_norm(hidden))
        conditional, unconditional = model.output(model.norm(hidden)).float()[:, -1].chunk(2)
        probabilities = F.softmax(unconditional + (conditional - unconditional) * self._scale, dim=-1)
        self._last = torch.multinomial(probabilities, num_samples=1)
        self.position += 1

    def skip_to(self, position: int) -> None:
        """Go on at `position`, as if all before it had been drawn."""
        if self._last is None:
            self.step()
        self.position = position

    def _attend(self, attention: Attention, x: Tensor, place: Tensor, cached: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = (part.view(batch, length, attention.num_heads, -1) for part in attention.wqkv(x).split(dim, dim=-1))
        rope = self._rope[place]
        q, k, v = (part.transpose(1, 2) for part in (rotated(q, rope), rotated(k, rope), v))
        cached[0][:, :, place], cached[1][:, :, place] = k, v
        keys, values = (part.repeat_interleave(1, dim=1) for part in cached)
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask[None, None, place])
        return attention.wo(mixed.transpose(1, 2).contiguous().view(batch, length, dim))
