"""Cross-entropy computed from the input of the output head, without float32 logits of the whole batch.

With 16,384 classes the logits are the largest tensor of a training step. The plain loss holds them three times: in the
dtype of the matrix product, in float32, and as log-probabilities for the backward pass. Here the head processes an
eighth of the rows at a time. Only the gradient of the logits is kept for the backward pass, in the product's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.layers import product_dtype

_SLICES = 8


def head_cross_entropy(
    features: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "N C"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy, nats, of the logits `features @ weight.T` with a float32 softmax.

    Each row has C target classes. They count equally, as if the row were repeated for each of them.
    """
    dtype = product_dtype(weight)
    apply: Callable[..., Tensor] = _HeadCrossEntropy.apply
    return apply(features.to(dtype), weight.to(dtype), targets)


class _HeadCrossEntropy(torch.autograd.Function):
    """Computes the gradient of the logits with the loss, in the memory of the logits: nothing is computed twice."""

    @staticmethod
    def forward(
        ctx: Any, features: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "N C"]
    ) -> Float[Tensor, ""]:
        """The loss. Saves the gradient of all logits if an input needs a gradient."""
        total = torch.zeros((), device=features.device)
        keep = any(ctx.needs_input_grad)
        kept = features.new_empty(len(features) if keep else 0, len(weight))
        step = -(-len(features) // _SLICES)
        for first in range(0, len(features), step):
            rows = slice(first, first + step)
            place = kept[rows] if keep else None
            product = torch.mm(features[rows], weight.T, out=place)
            logits, classes = product.float(), targets[rows]  # (n, V); of float32 products this is no copy
            normalizer = logits.logsumexp(dim=1, keepdim=True)
            total += (normalizer - logits.gather(1, classes)).sum()
            if place is not None:
                place.copy_(_logit_gradient(logits, normalizer, classes, targets.numel()))
        if keep:
            ctx.save_for_backward(features, weight, kept)
        return total / targets.numel()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        features, weight, kept = ctx.saved_tensors
        scale = gradients[0].type_as(features)
        return (kept @ weight) * scale, (kept.T @ features) * scale, None


def _logit_gradient(
    logits: Float[Tensor, "n V"], normalizer: Float[Tensor, "n 1"], targets: Int[Tensor, "n C"], count: int
) -> Float[Tensor, "n V"]:
    """Gradient of the mean over `count` targets: C times the probabilities minus the targets. Overwrites `logits`."""
    gradient = logits.sub_(normalizer).exp_().mul_(targets.shape[1] / count)
    return gradient.scatter_add_(1, targets, gradient.new_full((), -1 / count).expand(targets.shape))
