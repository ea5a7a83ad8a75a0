"""View of stage `evaluate`: the scores, computed from the features of a finished artifact."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from conf.evaluate import EvaluateConfig
from conf.runtime import RuntimeConfig
from stages.runtime.arrays import Features
from stages.runtime.artifact import write_json
from stages.runtime.job import Inputs, main
from stages.scores.feature_sets import FeatureSets
from stages.scores.frechet import frechet_distance
from stages.scores.inception_score import inception_score
from stages.scores.precision_recall import precision_recall
from stages.scores.statistics import FeatureStats
from stages.scores.table import RUNGS, SCORES

_SPLITS = 10


@dataclass(frozen=True)
class Found:
    """Features of a finished artifact, and the settings of the scores."""

    sets: FeatureSets
    config: EvaluateConfig

    @property
    def splits(self) -> int:
        """Number of splits of the Inception score."""
        return min(_SPLITS, len(self.sets.samples_logits))

    def distance(self, features: Features) -> float:
        """Fréchet distance between some images and the training images."""
        return frechet_distance(self.sets.reference, FeatureStats.of(features))


def _precision_recall(found: Found) -> dict[str, float]:
    sets = found.sets
    precision, recall = precision_recall(sets.compared, sets.features["samples"], neighbours=found.config.neighbours)
    return {"precision": precision, "recall": recall}


def _inception_score(found: Found) -> dict[str, float]:
    return {
        "inception_score": inception_score(found.sets.samples_logits, splits=found.splits, seed=found.config.seed)[0]
    }


COMPUTED: dict[tuple[str, ...], Callable[[Found], dict[str, float]]] = {
    ("frechet",): lambda found: {"frechet": found.distance(found.sets.features["samples"])},
    ("inception_score",): _inception_score,
    ("precision", "recall"): _precision_recall,
}
"""Functions that compute the scores. Scores that share work are computed together."""


def check_entries(computed: Iterable[tuple[str, ...]], described: Collection[str]) -> None:
    """Make sure that every score has code and an entry in the table.

    Raises:
        ValueError: One lacks the one or the other, or is computed twice.
    """
    names = [name for together in computed for name in together]
    problems = {
        "is computed and has no entry in stages/scores/table.py": set(names) - set(described),
        "has an entry and is not computed in stages/views/evaluate.py": set(described) - set(names),
        "is computed twice in stages/views/evaluate.py": {name for name in names if names.count(name) > 1},
    }
    if any(problems.values()):
        told = [f"{name} {problem}" for problem, found in problems.items() for name in sorted(found)]
        raise ValueError(f"scores: {', '.join(told)}")


check_entries(COMPUTED, SCORES)


def evaluate(config: EvaluateConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `metrics.json` with the scores, and `scores.json` with their settings."""
    sets = FeatureSets.open(inputs["evaluate"])
    found, extractor = Found(sets, config), sets.extractor
    scores: dict[str, float] = {}
    for compute in COMPUTED.values():
        scores |= compute(found)
    metrics = {SCORES[name].names[extractor.name]: value for name, value in scores.items()}
    metrics |= _ladder(found, SCORES["frechet"].names[extractor.name])
    metrics |= {"num_samples": len(sets.features["samples"]), "num_reference": sets.reference.n}
    write_json(output / "metrics.json", metrics)
    write_json(
        output / "scores.json",
        {
            "extractor": asdict(extractor),
            "reference": "training images, center crop",
            "inception_score_splits": found.splits,
            "inception_score_order": f"shuffled with seed {config.seed}",
            "neighbours": config.neighbours,
            "compared_reference": len(sets.compared),
            "num_images": {name: len(features) for name, features in sets.features.items()}
            | {"reference": sets.reference.n},
        },
    )


def _ladder(found: Found, name: str) -> dict[str, float]:
    """Distance of each rung to the reference. All rungs have as many images as are held out."""
    if "heldout" not in found.sets.features:
        return {}
    count = len(found.sets.features["heldout"])
    rungs = {rung: found.distance(found.sets.features[rung][:count]) for rung in RUNGS}
    return {f"{name}_{rung}": value for rung, value in rungs.items()} | {
        "ratio_to_marginals": rungs["samples"] / rungs["marginals"],
        "ratio_to_random": rungs["samples"] / rungs["random"],
    }


if __name__ == "__main__":
    main(evaluate, EvaluateConfig)
