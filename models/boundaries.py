"""What decides, while an image is drawn, where its patches open. The rule is that of the patch index."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Int
from torch import Tensor

from models.gpt import GPT, token_entropy
from models.patching import PatchRule, opens_patch


@runtime_checkable  # for the shape checks of the tests
class Boundaries(Protocol):
    """Decides, token by token, where patches open."""

    def begin(self, batch: int, num_tokens: int) -> None:
        """Start a batch of images."""

    def opens(self, position: int, previous: Int[Tensor, " B"], open_lengths: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
        """Whether the token at `position` >= 1 opens a patch, given the token before it and the open patch's length."""


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
        if self.model.config.num_tokens != num_tokens:
            raise ValueError(
                f"the entropy model was made for {self.model.config.num_tokens} tokens an image, the sampled model for "
                f"{num_tokens}: use an entropy model of the same tokenizer and image size"
            )
        self._cache = self.model.new_cache()

    def opens(self, position: int, previous: Int[Tensor, " B"], open_lengths: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
        """Apply the rule to the entropy of the token at `position`, which the token before it brings."""
        logits = self.model.step(self.model.tok_embeddings(previous), position - 1, self._cache)
        return opens_patch(self.rule, position, token_entropy(logits), open_lengths)


class GivenBoundaries:
    """Boundaries known beforehand: of static patches, (T,), or of every image, (B, T)."""

    def __init__(self, starts: Bool[Tensor, "*B T"]) -> None:
        self.starts = starts

    def begin(self, batch: int, num_tokens: int) -> None:
        """Check that they belong to these images."""
        if self.starts.shape not in {(num_tokens,), (batch, num_tokens)}:
            raise ValueError(f"boundaries are {tuple(self.starts.shape)}, expected ({num_tokens},) or ({batch}, ...)")

    def opens(self, position: int, previous: Int[Tensor, " B"], open_lengths: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
        """Look it up."""
        return self.starts[..., position].expand(len(previous))
