"""Sampling of one token from logits: temperature, top-k and top-p filters, and the inverse of the distribution.

Probabilities are float32. They are added up in two levels: the vocabulary is cut into blocks of tokens, one block is
found by the sums of all blocks, and the token by the probabilities in this block. Only these two short rows are summed
in float64. Shapes do not depend on values and the host never waits for the device: a CUDA graph can capture it all.

Source: LlamaGen's sampler, for the filters and their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor

from models.guidance import Schedule

BLOCK = 128
"""Tokens of a block: the square root of the codebook size in use, so that both levels are equally long."""


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
    """Token at which the cumulative distribution first exceeds the uniform number: one of nonzero probability.

    Float64 throughout would give another token only where the uniform number lies within rounding of the end of a
    token's interval. A row does not depend on the other rows of its batch.

    Args:
        logits: Of any precision. Minus infinity excludes a token. A row without a distribution (NaN, or minus infinity
            alone) gives some token of the vocabulary: rows that nobody reads do no harm.
        uniforms: Numbers in [0, 1).
        options: How tokens are sampled. Guidance has been applied to the logits.
    """
    if options.temperature != 1.0:
        logits = logits / max(options.temperature, 1e-5)
    probabilities = _filtered(logits, options).softmax(dim=-1, dtype=torch.float32)
    batch, vocabulary = logits.shape
    num_blocks = -(-vocabulary // BLOCK)
    if vocabulary % BLOCK:
        probabilities = F.pad(probabilities, (0, num_blocks * BLOCK - vocabulary))
    blocks = probabilities.reshape(batch, num_blocks, BLOCK)
    sums = blocks.sum(dim=-1).double()
    ends = sums.cumsum(dim=-1)
    position = uniforms.double()[:, None] * ends[:, -1:]
    block = _first_above(ends, position).clamp_(max=num_blocks - 1)
    # Below 1, because the block ends above the position. A share, because the sum of the block in float32 and that of
    # its tokens in float64 differ in their last digits.
    share = 1.0 - (ends.gather(1, block) - position) / sums.gather(1, block)
    ends = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(dim=-1)
    inside = _first_above(ends, share.clamp_(min=0.0) * ends[:, -1:])
    return (block * BLOCK + inside)[:, 0].clamp_(max=vocabulary - 1)


def _first_above(ends: Float64[Tensor, "B intervals"], position: Float64[Tensor, "B 1"]) -> Int[Tensor, "B 1"]:
    """Index of the first interval that ends above the position; the number of intervals if none does."""
    return torch.searchsorted(ends, position, right=True)


def _filtered(logits: Float[Tensor, "B V"], options: SamplingOptions) -> Float[Tensor, "B V"]:
    """Logits with minus infinity outside the top k, then outside the smallest set of probability top p."""
    if 0 < options.top_k < logits.shape[-1]:
        smallest = logits.topk(options.top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits = torch.where(logits < smallest, -torch.inf, logits)  # all that equal the k-th stay
    if options.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)  # probability of all likelier tokens
        before[:, 0] = 0.0  # the likeliest token always stays
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before > options.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits
