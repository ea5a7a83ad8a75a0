"""A threshold for each source of boundaries that a finished DPAR has of its own, and how near each comes to the index.

All of them give the mean patch length of the patch index on training images; what differs is where patches open.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from models.boundaries import OwnEntropyBoundaries
from models.entropy_head import EntropyHead
from models.patching import PatchRule, patch_starts
from stages.own_entropies import Rows, StoredTokens
from stages.thresholds import Entropies, EntropySample
from stages.training.entropy_head import EntropyData

HEAD: Final = "entropy_head"
OWN: Final = "own_entropy"
THRESHOLDS, ENTROPIES = "thresholds.json", "entropies.npz"
_HEAD_ROWS = 4096  # views that the head's threshold is chosen on: their mean patch length is known to about 0.3 %

Starts = NDArray[np.bool_]


@dataclass(frozen=True)
class Source:
    """A source of boundaries with its threshold.

    Attributes:
        threshold: Nats.
        calibration: Entropies of training images (rows, T) that it was chosen on, nats.
        heldout: Entropies of held-out images (rows, T), nats.
        heldout_starts: Where it opens patches in them (rows, T).
    """

    threshold: float
    calibration: Entropies
    heldout: Entropies
    heldout_starts: Starts


@dataclass(frozen=True)
class Calibration:
    """The sources of a model on the images that a patch index was made for.

    Attributes:
        shown: The model, as it will draw.
        data: Tokens, patches and the entropy model's entropies.
        saved_rule: The patch index's `rule.json`, of mode "entropy".
        num_images: Most training images, and most held-out ones, of which predictions are looked at.
    """

    shown: StoredTokens
    data: EntropyData
    saved_rule: dict[str, Any]
    num_images: int

    @cached_property
    def heldout(self) -> Rows:
        """Held-out images that are looked at; of all images where none are held out. Their first views."""
        total, first = len(self.data.store), self.data.store.num_train
        return _spread(first if first < total else 0, total, self.num_images)

    @cached_property
    def index_starts(self) -> Starts:
        """Where the patch index opens patches in the held-out images (rows, T)."""
        return self.data.index.starts(self.heldout, np.zeros_like(self.heldout))

    def of_head(self, head: EntropyHead) -> Source:
        """The head's entropies, as the sampler finds them."""
        found = self.shown.of_head(head, *self._training(_HEAD_ROWS))
        rule = self._rule(found)
        heldout = self.shown.of_head(head, self.heldout, np.zeros_like(self.heldout))
        return Source(rule.threshold, found, heldout, patch_starts(rule, torch.from_numpy(heldout)).numpy())

    def of_predictions(self) -> Source:
        """The model's own entropies: among the index's patches to choose the threshold, then among its own."""
        images, views = self._training(self.num_images)
        found = self._predicted(images, views)
        rule, first = self._rule(found), np.zeros_like(self.heldout)
        starts = self.shown.starts(OwnEntropyBoundaries(rule), self.heldout, first)
        return Source(rule.threshold, found, self._predicted(self.heldout, first), starts)

    def numbers(self, name: str, source: Source) -> dict[str, float]:
        """Threshold, and on held-out images what ties the source to the entropy model and the patch index.

        Correlation is Pearson's, of the entropies of all tokens but the first of an image. Agreement is the share of
        all tokens at which both or neither open a patch.
        """
        wanted = self.data.entropies.fetch(self.heldout, np.zeros_like(self.heldout))
        correlation = np.corrcoef(source.heldout[:, 1:].ravel(), wanted[:, 1:].ravel())[0, 1]
        return {
            f"{name}_threshold": source.threshold,
            f"{name}_correlation": float(correlation),
            f"{name}_agreement": float((source.heldout_starts == self.index_starts).mean()),
            f"{name}_mean_length": source.heldout_starts.size / int(source.heldout_starts.sum()),
        }

    def _rule(self, entropies: Entropies) -> PatchRule:
        """The patch index's, with the threshold that gives its mean length on these entropies."""
        saved = self.saved_rule
        rule = PatchRule(saved["threshold"], saved["max_length"], saved["row_boundary"], self.data.store.grid)
        sample = EntropySample.of_rows(entropies, self.data.store.codebook_size)
        return replace(rule, threshold=sample.find_threshold(saved["mean_length"], rule, "patch_index"))

    def _predicted(self, images: Rows, views: Rows) -> Entropies:
        starts = torch.from_numpy(self.data.index.starts(images, views))
        return self.shown.of_predictions(images, views, starts)

    def _training(self, most: int) -> tuple[Rows, Rows]:
        """Images and views, evenly spread over those of training."""
        images = self.data.store.num_train
        rows = _spread(0, images * self.data.store.num_views, most)
        return rows % images, rows // images


def _spread(first: int, end: int, most: int) -> Rows:
    return np.linspace(first, end - 1, min(end - first, most)).astype(np.int64)
