"""Blocks shared by LlamaGen, the entropy model and DPAR: norm, rotary attention, SwiGLU, class embedding.

Names of weights are LlamaGen's, so that its released checkpoints load.

Source: LlamaGen (arXiv 2406.06525), section 2.2; DPAR (arXiv 2512.21867), section 3.3, for dynamic positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps queries, keys and values (..., H, K) to attended values (..., H, K). It holds the mask, packing or cache."""

_ROPE_BASE = 10000.0


def product_dtype(x: Float[Tensor, "... D"]) -> torch.dtype:
    """Dtype in which linear layers compute on `x`: that of autocast if it is on, otherwise of `x`."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # the meta device has no autocast, and asking raises
        return torch.get_autocast_dtype(kind)
    return x.dtype


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, computed in float32 and rounded once.

    Under autocast the result has the dtype of the products that read it, so that it is cast once for all of them.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Normalised features, in `product_dtype`."""
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        return F.rms_norm(wide, self.weight.shape, self.weight, self.eps).to(product_dtype(x))


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions. The caller's `attend` decides which positions see which."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "... D"], rope: Float[Tensor, "... F 2"], attend: Attend
    ) -> Float[Tensor, "... D"]:
        """Attended features. `rope` holds the cosines and sines of each position."""
        qk, v = self.wqkv(x).unflatten(-1, (3 * self.num_heads, -1)).split((2 * self.num_heads, self.num_heads), dim=-2)
        q, k = apply_rope(qk, rope).chunk(2, dim=-2)  # (..., H, K)
        mixed = attend(q, k, v)
        return self.resid_dropout(self.wo(mixed.flatten(-2)))


class FeedForward(nn.Module):
    """SwiGLU. The hidden width is two thirds of 4 D, rounded up to a multiple of 256."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        hidden = -(-int(2 * 4 * dim / 3) // 256) * 256
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.ffn_dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Features w2 (silu(w1 x) * w3 x)."""
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Pre-norm transformer block of LlamaGen."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads, dropout)
        self.feed_forward = FeedForward(dim, dropout)
        self.attention_norm = RMSNorm(dim)
        self.ffn_norm = RMSNorm(dim)

    def forward(
        self, x: Float[Tensor, "... D"], rope: Float[Tensor, "... F 2"], attend: Attend
    ) -> Float[Tensor, "... D"]:
        """Features after attention and feed-forward, each with a residual connection."""
        x = x + self.attention(self.attention_norm(x), rope, attend)
        return x + self.feed_forward(self.ffn_norm(x))


class LabelEmbedder(nn.Module):
    """Class embeddings, and one more for the null class, which classifier-free guidance needs."""

    def __init__(self, num_classes: int, dim: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, labels: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """Embedding of each label. In training, labels are replaced by the null class, `num_classes`, at random."""
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


def check_tokens(tokens: Int[Tensor, "B T"], codebook_size: int) -> None:
    """Check the token range on the CPU; on a GPU the check would force a sync.

    Raises:
        ValueError: A token is negative, or not below `codebook_size`.
    """
    if tokens.device.type != "cpu" or not tokens.numel():
        return
    low, high = (int(bound) for bound in tokens.aminmax())
    if low < 0 or high >= codebook_size:
        raise ValueError(f"tokens from {low} to {high}, expected 0 to {codebook_size - 1}, the codebook")


def init_weights(module: nn.Module) -> None:
    """Initialise as LlamaGen: linear and embedding weights are normal with standard deviation 0.02, norms stay ones."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


def apply_rope(x: Float[Tensor, "... H K"], rope: Float[Tensor, "... F 2"]) -> Float[Tensor, "... H K"]:
    """Rotate adjacent pairs of channels in float32. A row of zeros in `rope` gives zeros.

    A pair is a complex number, and its rotation one product: one kernel instead of six. The compiler fuses the six into
    one, but cannot generate code for complex numbers.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (..., H, F, 2)
    rotated = _rotate(pairs, rope) if torch.compiler.is_compiling() else _rotate_complex(pairs, rope)
    return rotated.flatten(-2).type_as(x)


def _rotate_complex(pairs: Float[Tensor, "... H F 2"], rope: Float[Tensor, "... F 2"]) -> Float[Tensor, "... H F 2"]:
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope).unsqueeze(-2))


def _rotate(pairs: Float[Tensor, "... H F 2"], rope: Float[Tensor, "... F 2"]) -> Float[Tensor, "... H F 2"]:
    (real, imaginary), (cos, sin) = pairs.unbind(-1), rope.unsqueeze(-3).unbind(-1)
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)


def rope_of(angles: Float[Tensor, "... F"]) -> Float[Tensor, "... F 2"]:
    """Cosine and sine of each angle, given in radians."""
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def frequencies(count: int, width: int, device: torch.device | None = None) -> Float[Tensor, " count"]:
    """The frequencies 10000^(-2 i / width) for i below `count`, in radians per position."""
    exponents = torch.arange(count, dtype=torch.float32, device=device) * 2 / width
    return _ROPE_BASE**-exponents


@lru_cache(maxsize=32)
@torch.inference_mode(mode=False)  # a table first made while sampling is used by training too
def grid_rope(grid: int, head_dim: int, device: torch.device, *, class_row: bool) -> Float[Tensor, "S F 2"]:
    """Rotations of all positions of a token grid: half of the pairs rotate by the row, half by the column.

    `class_row` puts a row of zeros, not of angle zero, before the first token. Queries and keys of the class position
    become zero vectors, as in the training of LlamaGen's released weights.
    """
    position = torch.arange(grid * grid, device=device)
    freqs = frequencies(head_dim // 4, head_dim // 2, device)
    angles = torch.cat([(position // grid)[:, None] * freqs, (position % grid)[:, None] * freqs], dim=1)
    table = rope_of(angles)
    return torch.cat([torch.zeros_like(table[:1]), table]) if class_row else table


def dynamic_rope(
    first: Int[Tensor, " P"], last: Int[Tensor, " P"], grid: int, head_dim: int, *, redundant: bool
) -> Float[Tensor, "P F 2"]:
    """Rotations of patches that span tokens `first` to `last`: by the row of the first token and by both columns.

    Half of the pairs rotate by the row. The other half holds the columns (start, end, end, start), each at K / 16
    frequencies; if not `redundant`, it holds (start, end) at K / 8.

    Raises:
        ValueError: The head width is not a multiple of 16.

    Source: DPAR, section 3.3 and supplement, table S3.
    """
    if head_dim % 16:
        raise ValueError(f"head width is {head_dim}, expected a multiple of 16 for dynamic position embeddings")
    row, start, end = (x[:, None].float() for x in (first // grid, first % grid, last % grid))
    by_row = row * frequencies(head_dim // 4, head_dim // 2, first.device)
    if redundant:
        column = frequencies(head_dim // 16, head_dim // 8, first.device)
        by_column = [start * column, end * column, end * column, start * column]
    else:
        column = frequencies(head_dim // 8, head_dim // 4, first.device)
        by_column = [start * column, end * column]
    return rope_of(torch.cat([by_row, *by_column], dim=1))


def index_rope(index: Int[Tensor, " P"], head_dim: int) -> Float[Tensor, "P F 2"]:
    """Rotations of all pairs by one number, such as the number of a patch in its image."""
    return rope_of(index[:, None].float() * frequencies(head_dim // 2, head_dim, index.device))
