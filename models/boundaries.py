"""Where patches open while an image is drawn: an entropy of the next token, from one of several sources, and the rule.

Every source of entropies is held against the one rule of `models/patching.py`, each at a threshold of its own.
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
    """What is known when it must be decided whether the token at `position` >= 1 opens a patch."""

    position: int
    previous: Int[Tensor, " B"]
    """The token before it."""
    state: Float[Tensor, "B D"]
    """What DPAR's encoder made of the token before it."""
    open_lengths: Int[Tensor, " B"]
    """Tokens in the open patch."""
    open_logits: Callable[[], Float[Tensor, "B V"]]
    """Logits of the token, given its class, if it does not open a patch. To ask costs a step of the decoder."""


@runtime_checkable  # for the shape checks of the tests
class Boundaries(Protocol):
    """Decides, token by token, where patches open."""

    def begin(self, batch: int, num_tokens: int) -> None:
        """Start a batch of images."""

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Whether the token opens a patch."""


class EntropyBoundaries:
    """The rule of the patch index, on entropies that a cached entropy model computes on the way."""

    def __init__(self, model: GPT, rule: PatchRule) -> None:
        self.model, self.rule = model, rule
        self._cache = model.new_cache()

    def begin(self, batch: int, num_tokens: int) -> None:
        """Forget the images before.

        Raises:
            ValueError: The entropy model was made for another number of tokens.
        """
        _require_tokens("entropy model", self.model.config.num_tokens, num_tokens)
        self._cache = self.model.new_cache()

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Apply the rule to the entropy that the token before brings."""
        logits = self.model.step(self.model.tok_embeddings(token.previous), token.position - 1, self._cache)
        return opens_patch(self.rule, token.position, token_entropy(logits), token.open_lengths)


class HeadBoundaries:
    """The rule on entropies that a head reads off the encoder's states: no entropy model is needed."""

    def __init__(self, head: EntropyHead, rule: PatchRule) -> None:
        self.head, self.rule = head, rule
        self._cache = head.new_cache()

    def begin(self, batch: int, num_tokens: int) -> None:
        """Forget the images before.

        Raises:
            ValueError: The head was made for another number of tokens.
        """
        _require_tokens("entropy head", self.head.config.num_tokens, num_tokens)
        self._cache = self.head.new_cache()

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Apply the rule to what the head says."""
        entropies = self.head.step(token.state, token.position - 1, self._cache)
        return opens_patch(self.rule, token.position, entropies, token.open_lengths)


class OwnEntropyBoundaries:
    """The rule on the entropy of DPAR's own prediction, made as if the open patch went on.

    Where it does not, the sampler takes the decoder's step again, with what the closed patch brings.
    """

    def __init__(self, rule: PatchRule) -> None:
        self.rule = rule

    def begin(self, batch: int, num_tokens: int) -> None:
        """Nothing is kept."""

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Apply the rule to the entropy of the class-conditional prediction."""
        entropies = token_entropy(token.open_logits())
        return opens_patch(self.rule, token.position, entropies, token.open_lengths)


class GivenBoundaries:
    """Boundaries known beforehand: of static patches, (T,), or of every image, (B, T)."""

    def __init__(self, starts: Bool[Tensor, "*B T"]) -> None:
        self.starts = starts

    def begin(self, batch: int, num_tokens: int) -> None:
        """Check that they belong to these images."""
        if self.starts.shape not in {(num_tokens,), (batch, num_tokens)}:
            raise ValueError(f"boundaries are {tuple(self.starts.shape)}, expected ({num_tokens},) or ({batch}, ...)")

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Look it up."""
        return self.starts[..., token.position].expand(len(token.previous))


def _require_tokens(name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(
            f"the {name} was made for {found} tokens an image, the sampled model for {wanted}: use one of the same "
            "tokenizer and image size"
        )
