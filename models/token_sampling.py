"""Sampling of one token from logits: temperature, top-k and top-p filters, and the inverse of the distribution.

Source: LlamaGen's sampler, for the filters and their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.guidance import Schedule


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are sampled from logits. The defaults sample from the model's own distribution.

    Attributes:
        cfg_scale: Scale of classifier-free guidance; up to 1 there is none.
        cfg_schedule: See `guidance_scale`.
        cfg_interval: See `guidance_scale`.
        temperature: Divides the logits.
        top_k: Only the k likeliest tokens are sampled; 0 is no limit.
        top_p: Only the smallest set of likeliest tokens of at least this probability is sampled.
    """

    cfg_scale: float = 1.0
    cfg_schedule: Schedule = "constant"
    cfg_interval: tuple[int, int] | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether batches have an unconditional half."""
        return self.cfg_scale > 1.0


def sample_token(
    logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], options: SamplingOptions
) -> Int[Tensor, " B"]:
    """Token at which the cumulative distribution first exceeds the uniform number in [0, 1). Computed in float64."""
    probabilities = filter_logits(logits / max(options.temperature, 1e-5), options).double().softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    token = torch.searchsorted(cumulative, (uniforms.double() * cumulative[:, -1])[:, None], right=True)[:, 0]
    return token.clamp_(max=logits.shape[1] - 1)


def filter_logits(logits: Float[Tensor, "B V"], options: SamplingOptions) -> Float[Tensor, "B V"]:
    """Logits with minus infinity outside the top k, then outside the smallest set of probability top p."""
    if 0 < options.top_k < logits.shape[-1]:
        smallest = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if options.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)  # probability of all likelier tokens
        before[:, 0] = 0.0  # the likeliest token always stays
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before > options.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits
