"""What a run made, for a person: the ladder of scores, the other numbers, and where the pictures lie.

One distance means little alone. The ladder puts the samples between what no model can beat (held-out images, and the
same images after the tokenizer) and what any model must beat (tokens drawn without looking at each other).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.runtime.artifact import read_json
from stages.runtime.errors import ArtifactError

DISTANCES = ("fid", "fid_uncertified", "fd_lite0")
RUNGS = {
    "heldout": "real images kept from training: as close as so few images can be",
    "reconstruction": "those images through the tokenizer: what a perfect model would reach",
    "samples": "images drawn from the model, as many",
    "marginals": "each token drawn by its frequency at its place: nothing learned beyond counting",
    "random": "tokens drawn at random: nothing learned at all",
}
MEANINGS = {
    **dict.fromkeys(DISTANCES, "distance of all samples to the training images, lower is better"),
    **dict.fromkeys(("is_lite0", "inception_score"), "sharp and varied, higher is better"),
    **dict.fromkeys(("precision_lite0", "precision"), "share of samples that look like a training image"),
    **dict.fromkeys(("recall_lite0", "recall"), "share of training images that look like a sample"),
    "ratio_to_marginals": "samples / marginals, lower is better",
    "ratio_to_random": "samples / random, lower is better",
    "tokenizer_psnr": "of reconstructed images, dB",
    "entropy_model_heldout_loss": "nats a token",
    "entropy_model_unigram_loss": "nats a token, by counting alone",
    "train_heldout_loss": "nats a token",
    "train_unigram_loss": "nats a token, by counting alone",
    "patch_index_mean_length": "tokens a patch, in training images",
    "patch_index_patches_per_image": "positions of the global stack",
    "entropy_head_correlation": "of the head's entropies with the entropy model's, held-out images",
    "entropy_head_agreement": "share of tokens for which it opens a patch alike",
    "own_entropy_correlation": "the same of DPAR's own entropy",
    "own_entropy_agreement": "the same of DPAR's own entropy",
    "sample_mean_patch_length": "tokens a patch, in samples",
    "threshold": "nats; a token of a greater entropy opens a patch",
    "share_above_threshold": "of the tokens of training images",
}
PICTURES = (
    ("sample", "grid.png", "samples, one row a class"),
    ("sample", "patches.png", "images cut into patches"),
    ("entropy_head", "sources.png", "the same images as each source of boundaries cuts them"),
)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number with a few words on how to read it."""

    name: str
    value: float
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What finished artifacts say.

    Attributes:
        source: Stage whose numbers these are; None when no artifact has any.
        ladder: Distances to the training images, from the best possible to the worst.
        scores: The other numbers of `source`, in the order it wrote them.
        pictures: Path of each picture and what it shows.
    """

    source: str | None
    ladder: tuple[Score, ...]
    scores: tuple[Score, ...]
    pictures: tuple[tuple[Path, str], ...]


def collect(artifacts: Mapping[str, Path]) -> Report:
    """Report on finished artifacts, given in the order of the graph: the numbers are those of the last that has any."""
    source, metrics = None, dict[str, float]()
    for stage, path in artifacts.items():
        if (path / "metrics.json").is_file():
            source, metrics = stage, read_metrics(path)
    ladder = _ladder(metrics)
    rungs = {rung.name for rung in ladder}
    others = [name for name in metrics if name not in rungs]
    return Report(
        source=source,
        ladder=ladder,
        scores=tuple(Score(name=name, value=metrics[name], meaning=MEANINGS.get(name, "")) for name in others),
        pictures=tuple(
            (artifacts[stage] / name, meaning)
            for stage, name, meaning in PICTURES
            if stage in artifacts and (artifacts[stage] / name).is_file()
        ),
    )


def read_metrics(artifact: Path) -> dict[str, float]:
    """The numbers of an artifact.

    Raises:
        ArtifactError: There are none, or they are no flat object of numbers.
    """
    path = artifact / "metrics.json"
    try:
        metrics = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): `dpar verify` lists what is damaged") from error
    if not isinstance(metrics, dict) or not all(isinstance(value, (int, float)) for value in metrics.values()):
        raise ArtifactError(f"{path} holds something else than a flat object of numbers: `dpar verify` checks it")
    return metrics


def _ladder(metrics: Mapping[str, float]) -> tuple[Score, ...]:
    """The rungs that there are: without held-out images there are none."""
    base = next((name for name in DISTANCES if name in metrics), "")
    rungs = {f"{base}_{rung}": meaning for rung, meaning in RUNGS.items()}
    return tuple(
        Score(name=name, value=metrics[name], meaning=meaning) for name, meaning in rungs.items() if name in metrics
    )
