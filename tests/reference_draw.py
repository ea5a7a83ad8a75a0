"""Sampling of a token in float64 over the whole vocabulary: what `models.token_sampling` must agree with."""

from __future__ import annotations

import torch
from torch import Tensor

from models.token_sampling import SamplingOptions


def reference_token(logits: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    """Token (B,) at which the cumulative distribution first exceeds the uniform number."""
    probabilities = filtered(logits / max(options.temperature, 1e-5), options).double().softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    token = torch.searchsorted(cumulative, (uniforms.double() * cumulative[:, -1])[:, None], right=True)[:, 0]
    return token.clamp_(max=logits.shape[1] - 1)


def filtered(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Logits (B, V) with minus infinity outside the top k, then outside the smallest set of probability top p."""
    if 0 < options.top_k < logits.shape[-1]:
        smallest = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if options.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0.0
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before > options.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits
