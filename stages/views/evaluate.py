"""View of stage `evaluate`: the scores, computed from the features of a finished artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conf.evaluate import EvaluateConfig
from conf.schema import RuntimeConfig
from stages.evaluate import EXTRACTOR, FEATURES
from stages.runtime.artifact import read_json, write_json
from stages.runtime.errors import ArtifactError
from stages.runtime.job import Inputs, main
from stages.scores.frechet import frechet_distance
from stages.scores.inception_score import inception_score
from stages.scores.precision_recall import precision_recall
from stages.scores.statistics import FeatureStats
from stages.scores.table import RUNGS, SCORES

Features = npt.NDArray[np.float32]
_SPLITS = 10


@dataclass(frozen=True)
class Found:
    """Features of a finished artifact, and the settings of the scores."""

    arrays: dict[str, npt.NDArray[Any]]
    config: EvaluateConfig

    @property
    def samples(self) -> Features:
        """Features of all samples, (N, D)."""
        return self.arrays["samples"]

    @property
    def splits(self) -> int:
        """Parts that the samples are split into for the Inception score."""
        return min(_SPLITS, len(self.arrays["samples_logits"]))

    @property
    def reference(self) -> FeatureStats:
        """Statistics of the training images' features."""
        count = int(self.arrays["reference_count"])
        return FeatureStats(count, self.arrays["reference_mean"], self.arrays["reference_covariance"] * (count - 1))

    def distance(self, features: Features) -> float:
        """Fréchet distance of some images to the training images."""
        return frechet_distance(self.reference, FeatureStats.of(features))


def _precision_recall(found: Found) -> dict[str, float]:
    compared = found.arrays["reference_compared"]
    precision, recall = precision_recall(compared, found.samples, neighbours=found.config.neighbours)
    return {"precision": precision, "recall": recall}


def _inception_score(found: Found) -> dict[str, float]:
    logits = found.arrays["samples_logits"]
    return {"inception_score": inception_score(logits, splits=found.splits, seed=found.config.seed)[0]}


COMPUTED: dict[tuple[str, ...], Callable[[Found], dict[str, float]]] = {
    ("frechet",): lambda found: {"frechet": found.distance(found.samples)},
    ("inception_score",): _inception_score,
    ("precision", "recall"): _precision_recall,
}
"""How scores are computed, those together that share their work."""
assert sorted(name for names in COMPUTED for name in names) == sorted(SCORES), (
    "a score without an entry, or without code"
)


def evaluate(config: EvaluateConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `metrics.json` (flat) and `scores.json` (how they were made)."""
    path = inputs["evaluate"] / FEATURES
    try:
        # NumPy leaves a file open that it opened itself and that turns out to be damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            found = Found(dict(saved), config)
    except Exception as error:  # on damaged bytes zipfile and NumPy raise almost anything
        raise ArtifactError(f"{path} is damaged ({error}): `dpar verify --deep` names what is") from error
    extractor = read_json(inputs["evaluate"] / EXTRACTOR)
    scores: dict[str, float] = {}
    for compute in COMPUTED.values():
        scores |= compute(found)
    metrics = {SCORES[name].names[extractor["name"]]: value for name, value in scores.items()}
    metrics |= _ladder(found, SCORES["frechet"].names[extractor["name"]])
    metrics |= {"num_samples": len(found.samples), "num_reference": found.reference.n}
    write_json(output / "metrics.json", metrics)
    write_json(
        output / "scores.json",
        {
            "extractor": extractor,
            "reference": "training images, center crop",
            "inception_score_splits": found.splits,
            "inception_score_order": f"shuffled with seed {config.seed}",
            "neighbours": config.neighbours,
            "compared_reference": len(found.arrays["reference_compared"]),
            "num_images": {name: len(found.arrays[name]) for name in RUNGS if name in found.arrays}
            | {"reference": found.reference.n},
        },
    )


def _ladder(found: Found, name: str) -> dict[str, float]:
    """Distance of each set to the reference; on the ladder the samples are as many as the held-out images."""
    if "heldout" not in found.arrays:
        return {}
    count = len(found.arrays["heldout"])
    rungs = {rung: found.distance(found.arrays[rung][:count]) for rung in RUNGS}
    return {f"{name}_{rung}": value for rung, value in rungs.items()} | {
        "ratio_to_marginals": rungs["samples"] / rungs["marginals"],
        "ratio_to_random": rungs["samples"] / rungs["random"],
    }


if __name__ == "__main__":
    main(evaluate, EvaluateConfig)
