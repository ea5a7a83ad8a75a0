"""Patch boundaries during sampling: the rule of patching.py on entropies from one of three sources, or given starts.

Each source of entropies has its own threshold: the entropy model, an entropy head, or DPAR's own prediction.

Source: DPAR (arXiv 2512.21867), section 3.2 and Algorithm 1, for the entropy model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.attention import causal_attention
from models.cached_gpt import gpt_logits, prefilled
from models.entropy_head import EntropyHead
from models.gpt import GPT, token_entropy
from models.kv_cache import KVCache
from models.patching import PatchRule, opens_patch, patch_starts


@dataclass(frozen=True)
class NextTokens:
    """Input of the decision whether tokens at positions >= 1 open patches. The tokens themselves are not drawn yet."""

    images: Int[Tensor, " R"]
    """Number of each token's image."""
    slots: Int[Tensor, " R"]
    """Where caches keep what belongs to the image."""
    positions: Int[Tensor, " R"]
    previous: Int[Tensor, " R"]
    """The token before."""
    states: Float[Tensor, "R D"]
    """State of DPAR's encoder at the token before."""
    open_lengths: Int[Tensor, " R"]
    """Number of tokens in the open patch."""
    logits: Float[Tensor, "R V"] | None = None
    """Class-conditional logits of the token if it opens no patch, for boundaries that read them."""


@dataclass(frozen=True)
class PrefixTokens:
    """The first M tokens of images, which are given."""

    images: Int[Tensor, " R"]
    slots: Int[Tensor, " R"]
    tokens: Int[Tensor, "R M"]
    states: Float[Tensor, "R M D"]
    """State of DPAR's encoder at each token."""


@runtime_checkable  # the test suite checks arguments at run time
class Boundaries(Protocol):
    """Decides token by token which images open a patch."""

    reads_logits: bool
    """Whether the decision reads `NextTokens.logits`. It then costs a decoder step where a patch opens."""

    @property
    def longest(self) -> int:
        """Length of the longest patch that is possible, in tokens."""

    def begin(self, slots: int, num_images: int, num_tokens: int) -> None:
        """Start sampling of some images, of which as many as there are slots are in flight."""

    def opens(self, tokens: NextTokens) -> Bool[Tensor, " R"]:
        """Whether each token opens a patch. Answers for tokens after the last one are ignored."""

    def prefill(self, prefix: PrefixTokens) -> Bool[Tensor, "R M1"]:
        """Whether each token of a prefix opens a patch, and the token after it (M1 = M + 1).

        Boundaries that read logits are asked token by token instead.
        """


class RuleBoundaries(ABC):
    """The rule of the patch index on entropies. Subclasses say whose entropies."""

    reads_logits = False

    def __init__(self, rule: PatchRule) -> None:
        self.rule = rule

    @property
    def longest(self) -> int:
        """Length of the longest patch that is possible, in tokens."""
        return self.rule.longest

    def begin(self, slots: int, num_images: int, num_tokens: int) -> None:
        """Do nothing: there is no state."""
        return

    def opens(self, tokens: NextTokens) -> Bool[Tensor, " R"]:
        """Apply the rule to the entropies."""
        return opens_patch(self.rule, tokens.positions, self.entropies(tokens), tokens.open_lengths)

    def prefill(self, prefix: PrefixTokens) -> Bool[Tensor, "R M1"]:
        """Apply the rule to the entropies of all tokens."""
        entropies = self.prefix_entropies(prefix)
        return patch_starts(self.rule, torch.cat([torch.zeros_like(entropies[:, :1]), entropies], dim=1))

    @abstractmethod
    def entropies(self, tokens: NextTokens) -> Float[Tensor, " R"]:
        """Entropy of each token, nats."""

    def prefix_entropies(self, prefix: PrefixTokens) -> Float[Tensor, "R M"]:
        """Entropies of the tokens after each token of a prefix, nats."""
        raise NotImplementedError(f"{type(self).__name__} reads logits, expected to be asked token by token")


class EntropyBoundaries(RuleBoundaries):
    """Entropies of a cached entropy model that runs beside the sampler, as in the patch index."""

    def __init__(self, model: GPT, rule: PatchRule) -> None:
        super().__init__(rule)
        self.model = model

    def begin(self, slots: int, num_images: int, num_tokens: int) -> None:
        """Start with an empty cache.

        Raises:
            ValueError: The entropy model is for another number of tokens.
        """
        _require_tokens("entropy model", self.model.config.num_tokens, num_tokens)
        self._cache = KVCache(len(self.model.layers), slots, num_tokens)

    def entropies(self, tokens: NextTokens) -> Float[Tensor, " R"]:
        """Feed the tokens before to the entropy model."""
        embedded = self.model.tok_embeddings(tokens.previous)
        return token_entropy(gpt_logits(self.model, embedded, tokens.slots, tokens.positions - 1, self._cache))

    def prefix_entropies(self, prefix: PrefixTokens) -> Float[Tensor, "R M"]:
        """Feed all tokens to the entropy model."""
        embedded = self.model.tok_embeddings(prefix.tokens)
        return self.model.entropies_after(prefilled(self.model, embedded, prefix.slots, self._cache))


class HeadBoundaries(RuleBoundaries):
    """Entropies that a head predicts from the encoder's states. No entropy model runs."""

    def __init__(self, head: EntropyHead, rule: PatchRule) -> None:
        super().__init__(rule)
        self.head = head

    def begin(self, slots: int, num_images: int, num_tokens: int) -> None:
        """Start with an empty cache.

        Raises:
            ValueError: The head is for another number of tokens.
        """
        _require_tokens("entropy head", self.head.config.num_tokens, num_tokens)
        self._cache = KVCache(1, slots, num_tokens)

    def entropies(self, tokens: NextTokens) -> Float[Tensor, " R"]:
        """Feed the encoder's states to the head."""
        (attend,) = self._cache.step(tokens.slots, tokens.positions - 1)
        return self.head.predict(tokens.states, self.head.rope(tokens.states.device)[tokens.positions - 1], attend)

    def prefix_entropies(self, prefix: PrefixTokens) -> Float[Tensor, "R M"]:
        """Feed all states to the head."""
        places = torch.arange(prefix.tokens.shape[1], device=prefix.slots.device)
        (attend,) = self._cache.prefill(prefix.slots[:, None], places, causal_attention)
        return self.head.predict(prefix.states, self.head.rope(prefix.states.device)[places], attend)


class OwnEntropyBoundaries(RuleBoundaries):
    """Entropies of DPAR's own predictions, computed as if the open patch continued.

    Where the patch closes, the sampler repeats the decoder step with the context of the closed patch.
    """

    reads_logits = True

    def entropies(self, tokens: NextTokens) -> Float[Tensor, " R"]:
        """Entropies of the class-conditional predictions."""
        assert tokens.logits is not None
        return token_entropy(tokens.logits)


class GivenBoundaries:
    """Boundaries known in advance: one row for all images (T,), as of static patches, or one for each (N, T)."""

    reads_logits = False

    def __init__(self, starts: Bool[Tensor, "*N T"]) -> None:
        self.starts = starts
        positions = torch.arange(starts.shape[-1], device=starts.device)
        self._longest = 1 + int((positions - torch.where(starts, positions, 0).cummax(dim=-1).values).max())

    @property
    def longest(self) -> int:
        """Length of the longest patch, in tokens."""
        return self._longest

    def begin(self, slots: int, num_images: int, num_tokens: int) -> None:
        """Check the shape of the boundaries.

        Raises:
            ValueError: They are for another number of images or tokens.
        """
        if self.starts.shape not in {(num_tokens,), (num_images, num_tokens)}:
            raise ValueError(
                f"boundaries are {tuple(self.starts.shape)}, expected ({num_tokens},) or ({num_images}, ...)"
            )

    def opens(self, tokens: NextTokens) -> Bool[Tensor, " R"]:
        """Look up the starts."""
        positions = tokens.positions.clamp(max=self.starts.shape[-1] - 1)
        if self.starts.ndim == 1:
            return self.starts[positions]
        return self.starts[tokens.images.clamp(max=len(self.starts) - 1), positions]

    def prefill(self, prefix: PrefixTokens) -> Bool[Tensor, "R M1"]:
        """Look up the starts. None is known after the last token."""
        starts = self.starts.expand(len(prefix.slots), -1) if self.starts.ndim == 1 else self._of(prefix.images)
        return F.pad(starts, (0, 1))[:, : prefix.tokens.shape[1] + 1]

    def _of(self, images: Int[Tensor, " R"]) -> Bool[Tensor, "R T"]:
        return self.starts[images.clamp(max=len(self.starts) - 1)]


def _require_tokens(name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(
            f"the {name} is for {found} tokens an image, the sampled model for {wanted}: use one trained with the same "
            "tokenizer and image size"
        )
