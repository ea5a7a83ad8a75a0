"""What decides, while an image is drawn, where its patches open.

All sources but given boundaries apply the one rule of the patch index, each to entropies of its own: of an entropy
model beside the sampled model, of a head on the sampled model's encoder, or of the sampled model's own predictions.
Their entropies differ, so each has a threshold of its own in its rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.entropy_head import EntropyHead
from models.gpt import GPT, token_entropy
from models.patching import PatchRule, opens_patch


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """What is known when it is decided whether the next token opens a patch."""

    position: int
    """Of the next token, from 1 on."""
    previous: Int[Tensor, " B"]
    """The token before it."""
    state: Float[Tensor, "B D"]
    """The encoder's state of the token before it."""
    open_lengths: Int[Tensor, " B"]
    """Tokens that the open patch has."""
    logits_if_it_goes_on: Callable[[], Float[Tensor, "B V"]]
    """The model's prediction, without guidance, if the open patch took the next token in. Takes a decoder step."""


@runtime_checkable  # for the shape checks of the tests
class Boundaries(Protocol):
    """Decides, token by token, where patches open."""

    def begin(self, batch: int, num_tokens: int) -> None:
        """Start a batch of images."""

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Whether the next token opens a patch in each image."""


class EntropyBoundaries:
    """By entropies that a cached entropy model computes on the way."""

    def __init__(self, model: GPT, rule: PatchRule) -> None:
        self.model, self.rule = model, rule
        self._cache = model.new_cache()

    def begin(self, batch: int, num_tokens: int) -> None:
        """Forget the images before.

        Raises:
            ValueError: The entropy model was made for another number of tokens.
        """
        if self.model.config.num_tokens != num_tokens:
            raise ValueError(
                f"the entropy model was made for {self.model.config.num_tokens} tokens an image, the sampled model for "
                f"{num_tokens}: use an entropy model of the same tokenizer and image size"
            )
        self._cache = self.model.new_cache()

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Apply the rule to the entropy that the token before brings; it is needed for the cache in any case."""
        logits = self.model.step(self.model.tok_embeddings(token.previous), token.position - 1, self._cache)
        return opens_patch(self.rule, token.position, token_entropy(logits), token.open_lengths)


class EntropyHeadBoundaries:
    """By entropies that a head tells from the encoder's states: the only source that costs next to nothing."""

    def __init__(self, head: EntropyHead, rule: PatchRule) -> None:
        self.head, self.rule = head, rule

    def begin(self, batch: int, num_tokens: int) -> None:
        """Nothing: the head remembers no image."""

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Apply the rule to the head's entropy."""
        return opens_patch(self.rule, token.position, self.head(token.state), token.open_lengths)


class OwnEntropyBoundaries:
    """By the entropy of the sampled model's own prediction, which knows the class, if the open patch went on.

    Where the patch does not go on, the sampler predicts the token again, from the context that is one patch longer.
    """

    def __init__(self, rule: PatchRule) -> None:
        self.rule = rule

    def begin(self, batch: int, num_tokens: int) -> None:
        """Nothing: the sampler has all that is needed."""

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Apply the rule to the entropy; no prediction is made where the rule opens every patch whatever it is."""
        lowest = torch.full_like(token.open_lengths, -torch.inf, dtype=torch.float32)
        opened = opens_patch(self.rule, token.position, lowest, token.open_lengths)
        if bool(opened.all()):
            return opened
        entropies = token_entropy(token.logits_if_it_goes_on())
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
