"""Entropies that a finished DPAR has of its own: its head's, and those of its own predictions; of stored tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from models.boundaries import Boundaries, GivenBoundaries, NextToken
from models.dpar import DPAR
from models.entropy_head import EntropyHead
from models.gpt import token_entropy
from models.sampling import SamplingOptions, sample_dpar
from stages.stores.tokens import TokenStore
from stages.thresholds import Entropies

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class StoredTokens:
    """Tokens of a store that a finished model is shown, some images at a time; entropies are (rows, T), nats.

    As in an entropy store, the first token of an image is predicted by nobody: its entry is ln(codebook size).
    """

    model: DPAR
    store: TokenStore
    batch_size: int

    @torch.inference_mode()
    def of_head(self, head: EntropyHead, images: Rows, views: Rows) -> Entropies:
        """What the head tells from the encoder's states."""
        return np.concatenate(
            [self._with_first(head(self.model.encoder_states(tokens))) for tokens, _ in self._batches(images, views)]
        )

    @torch.inference_mode()
    def of_predictions(self, images: Rows, views: Rows, starts: Bool[Tensor, "N T"]) -> Entropies:
        """Of the prediction of each token, had it not opened a patch, among patches that start where `starts` says."""
        parts = []
        for number, (tokens, labels) in enumerate(self._batches(images, views)):
            rows = slice(number * self.batch_size, number * self.batch_size + len(tokens))
            listener = _Listener(starts[rows].to(tokens.device))
            self._show(tokens, labels, listener)
            parts.append(self._with_first(torch.stack(listener.entropies, dim=1)))
        return np.concatenate(parts)

    @torch.inference_mode()
    def starts(self, boundaries: Boundaries, images: Rows, views: Rows) -> NDArray[np.bool_]:
        """Where a source opens patches (rows, T) when the sampler draws just these tokens."""
        batches = self._batches(images, views)
        return np.concatenate([self._show(tokens, labels, boundaries) for tokens, labels in batches])

    def _show(self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, " B"], boundaries: Boundaries) -> NDArray[np.bool_]:
        unused = torch.zeros(tokens.shape, device=tokens.device)
        _, starts = sample_dpar(self.model, labels, unused, SamplingOptions(), boundaries, prefix=tokens)
        found: NDArray[np.bool_] = starts.cpu().numpy()
        return found

    def _batches(self, images: Rows, views: Rows) -> Iterator[tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]]:
        device = self.model.tok_embeddings.weight.device
        for first in range(0, len(images), self.batch_size):
            rows = slice(first, first + self.batch_size)
            tokens = self.store.fetch(images[rows], views[rows]).astype(np.int64)
            labels = self.store.labels[images[rows]].astype(np.int64)
            yield torch.from_numpy(tokens).to(device), torch.from_numpy(labels).to(device)

    def _with_first(self, entropies: Float[Tensor, "B S"]) -> Entropies:
        first = np.full((len(entropies), 1), math.log(self.store.codebook_size), dtype=np.float32)
        return np.concatenate([first, entropies.float().cpu().numpy()], axis=1)


class _Listener(GivenBoundaries):
    """Given boundaries, and the entropies of what the model would predict without them."""

    def __init__(self, starts: Bool[Tensor, "B T"]) -> None:
        super().__init__(starts)
        self.entropies: list[Float[Tensor, " B"]] = []

    def opens(self, token: NextToken) -> Bool[Tensor, " B"]:
        """Look it up, and listen."""
        self.entropies.append(token_entropy(token.logits_if_it_goes_on()))
        return super().opens(token)
