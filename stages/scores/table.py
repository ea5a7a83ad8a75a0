"""The scores: name, meaning, and which of two values is better. No other module names a score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ExtractorName = Literal["lite0", "inception"]


@dataclass(frozen=True, kw_only=True)
class ScoreInfo:
    """Description of a score.

    Attributes:
        names: Name of the score by feature network. No name is a bare `fid`: FID means 50,000 samples, the certified
            weights and a published reference. The reference here is the data set's own training images.
        meaning: One line.
        better: Which of two values is better.
        source: Paper that defines the score.
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
    "heldout": "held-out real images: the lowest distance that this number of images can reach",
    "reconstruction": "held-out images encoded and decoded by the tokenizer: the limit for a perfect model",
    "samples": "images sampled from the model, as many as are held out",
    "marginals": "tokens sampled from each position's marginal distribution: a unigram model",
    "random": "tokens sampled uniformly: an untrained model",
}
"""The ladder: image sets by their expected distance to the training images, lowest first."""
