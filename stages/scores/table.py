"""The scores: what each is called, what it means, and which of two values is better. Nothing else names a score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ExtractorName = Literal["lite0", "inception"]


@dataclass(frozen=True, kw_only=True)
class ScoreInfo:
    """What a person must know to read a score.

    Attributes:
        names: Its honest name by the network that the features are from. Never a bare `fid`: that name is for 50,000
            samples, the certified weights and a published reference; the reference here is the data set's own images.
        meaning: One line.
        better: Which of two values is better.
        source: Where it is defined.
    """

    names: Mapping[ExtractorName, str]
    meaning: str
    better: Literal["lower", "higher"]
    source: str


SCORES: dict[str, ScoreInfo] = {
    "frechet": ScoreInfo(
        names={"lite0": "fd_lite0", "inception": "fid_uncertified"},
        meaning="distance of all samples to the training images",
        better="lower",
        source="Heusel et al., arXiv 1706.08500",
    ),
    "inception_score": ScoreInfo(
        names={"lite0": "is_lite0", "inception": "inception_score"},
        meaning="sharp and varied samples",
        better="higher",
        source="Salimans et al., arXiv 1606.03498",
    ),
    "precision": ScoreInfo(
        names={"lite0": "precision_lite0", "inception": "precision"},
        meaning="share of samples that look like a training image",
        better="higher",
        source="Kynkäänniemi et al., arXiv 1904.06991",
    ),
    "recall": ScoreInfo(
        names={"lite0": "recall_lite0", "inception": "recall"},
        meaning="share of training images that look like a sample",
        better="higher",
        source="Kynkäänniemi et al., arXiv 1904.06991",
    ),
}
RUNGS: dict[str, str] = {
    "heldout": "real images kept from training: as close as so few images can be",
    "reconstruction": "those images through the tokenizer: what a perfect model would reach",
    "samples": "images sampled from the model, as many",
    "marginals": "each token drawn by its frequency at its place: nothing learned beyond counting",
    "random": "tokens drawn at random: nothing learned at all",
}
"""The ladder of distances to the training images, from the best possible to the worst."""
