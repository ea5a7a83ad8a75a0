"""Patch boundaries during sampling: the rule of patching.py on entropies from one of three sources, or given starts.

Each source of entropies has its own threshold: the entropy model, an entropy head, or DPAR's own prediction.

Source: DPAR (arXiv 2512.21867), section 3.2 and Algorithm 1, for the entropy model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.entropy_head import EntropyHead
from models.gpt import GPT, token_entropy
from models.patching import PatchRule, opens_patch


@dataclass(frozen=True)
class NextToken:
    """Input of the decision whether the token at `position` >= 1 opens a patch. The token itself is not sampled yet."""

    position: int
    previous: Int[Tensor, " B"]
    """The token at `position` - 1."""
    state: Float[Tensor, "B D"]
    """State of DPAR's encoder at the token before."""
    open_lengths: Int[Tensor, " B"]
    """Number of tokens in the open patch."""
    open_logits: Callable[[], Float[Tensor, "B V"]]
    """Class-conditional logits of the token if it opens no patch. Lazy: evaluating it costs one decoder step."""


@runtime_checkable  # the test suite checks arguments at run time
class Boundaries(Protocol):
    """Decides token by token which images open a patch."""

    def begin(self, batch: int, num_tokens: int) -> None:
        """Start a batch of images."""

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Whether the token opens a patch, for each image."""


class EntropyBoundaries:
    """The rule of the patch index, on entropies of a cached entropy model that runs beside the sampler."""

    def __init__(self, model: GPT, rule: PatchRule) -> None:
        self.model, self.rule = model, rule
        self._cache = model.new_cache()

    def begin(self, batch: int, num_tokens: int) -> None:
        """Start with an empty cache.

        Raises:
            ValueError: The entropy model is for another number of tokens.
        """
        _require_tokens("entropy model", self.model.config.num_tokens, num_tokens)
        self._cache = self.model.new_cache()

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Feed the token before to the entropy model and apply the rule to the predicted entropy."""
        logits = self.model.step(self.model.tok_embeddings(token.previous), token.position - 1, self._cache)
        return opens_patch(self.rule, token.position, token_entropy(logits), token.open_lengths)


class HeadBoundaries:
    """The rule on entropies that a head predicts from the encoder's states. No entropy model runs."""

    def __init__(self, head: EntropyHead, rule: PatchRule) -> None:
        self.head, self.rule = head, rule
        self._cache = head.new_cache()

    def begin(self, batch: int, num_tokens: int) -> None:
        """Start with an empty cache.

        Raises:
            ValueError: The head is for another number of tokens.
        """
        _require_tokens("entropy head", self.head.config.num_tokens, num_tokens)
        self._cache = self.head.new_cache()

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Feed the encoder's state to the head and apply the rule to the predicted entropy."""
        entropies = self.head.step(token.state, token.position - 1, self._cache)
        return opens_patch(self.rule, token.position, entropies, token.open_lengths)


class OwnEntropyBoundaries:
    """The rule on the entropy of DPAR's own prediction, computed as if the open patch continued.

    Where the patch closes, the sampler repeats the decoder step with the context of the closed patch.
    """

    def __init__(self, rule: PatchRule) -> None:
        self.rule = rule

    def begin(self, batch: int, num_tokens: int) -> None:
        """Do nothing: there is no state."""

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Apply the rule to the entropy of the class-conditional prediction."""
        entropies = token_entropy(token.open_logits())
        return opens_patch(self.rule, token.position, entropies, token.open_lengths)


class GivenBoundaries:
    """Boundaries known in advance: one row for all images (T,), as of static patches, or one for each (B, T)."""

    def __init__(self, starts: Bool[Tensor, "*B T"]) -> None:
        self.starts = starts

    def begin(self, batch: int, num_tokens: int) -> None:
        """Check the shape of the boundaries.

        Raises:
            ValueError: They are for another number of images or tokens.
        """
        if self.starts.shape not in {(num_tokens,), (batch, num_tokens)}:
            raise ValueError(f"boundaries are {tuple(self.starts.shape)}, expected ({num_tokens},) or ({batch}, ...)")

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Look up the start at the token's position."""
        return self.starts[..., token.position].expand(len(token.previous))


def _require_tokens(name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(
            f"the {name} is for {found} tokens an image, the sampled model for {wanted}: use one trained with the same "
            "tokenizer and image size"
        )
