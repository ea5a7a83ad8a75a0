"""Report of a run: the ladder of distances, the other scores, and the paths of the pictures.

A single distance means little. The ladder compares the samples with bounds: held-out images and their reconstructions
by the tokenizer, which no model can beat, and independently sampled tokens, which any model must beat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from conf.boundary_sources import BOUNDARY_SOURCES, calibrated_sources
from pipeline.views import VIEWS, read_metrics
from stages.scores.table import RUNGS, SCORES

DISTANCES = ("fid", *SCORES["frechet"].names.values())
CARRIED: dict[tuple[str, str], tuple[str, str]] = {
    ("tokenizer", "psnr"): ("tokenizer_psnr", "dB, of reconstructed images"),
    ("entropy_model", "heldout_loss"): ("entropy_model_heldout_loss", "nats a token"),
    ("entropy_model", "unigram_loss"): ("entropy_model_unigram_loss", "nats a token, from token frequencies"),
    ("train", "heldout_loss"): ("train_heldout_loss", "nats a token"),
    ("train", "unigram_loss"): ("train_unigram_loss", "nats a token, from token frequencies"),
    ("patch_index", "mean_length"): ("patch_index_mean_length", "tokens a patch, in training images"),
    ("patch_index", "patches_per_image"): ("patch_index_patches_per_image", "positions in the global stack"),
    **{
        ("entropy_head", f"{source}_{name}"): (f"{source}_{name}", f"{meaning} ({BOUNDARY_SOURCES[source].label})")
        for source in calibrated_sources()
        for name, meaning in (
            ("correlation", "with the entropies of the entropy model, held-out images"),
            ("agreement", "share of tokens where it and the entropy model agree on a boundary"),
        )
    },
    ("sample", "sample_mean_patch_length"): ("sample_mean_patch_length", "tokens a patch, in samples"),
}
"""Numbers of earlier stages that are reported with the scores: name in the report, and meaning."""
MEANINGS = {
    **{name: f"{info.meaning}, {info.better} is better" for info in SCORES.values() for name in info.names.values()},
    "ratio_to_marginals": "samples / marginals, lower is better",
    "ratio_to_random": "samples / random, lower is better",
    "threshold": "nats; a token with a greater entropy opens a patch",
    "share_above_threshold": "share of training tokens above the threshold",
    **dict(CARRIED.values()),
}
PICTURES = (
    ("sample", "grid.png", "samples, one row a class"),
    ("patch_index", "patches.png", "images cut into patches"),
    ("patch_index", "histograms.png", "patch lengths and entropies"),
    ("entropy_head", "sources.png", "the same images cut by each boundary source"),
)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number and its meaning."""

    name: str
    value: float
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Numbers and pictures of finished artifacts.

    Attributes:
        source: Stage whose numbers come first; None if no artifact has any.
        ladder: Distances to the training images, from the best possible to the worst.
        scores: The other numbers: those of `source` in the order of its view, then those of earlier stages.
        pictures: Path of each picture and what it shows.
    """

    source: str | None
    ladder: tuple[Score, ...]
    scores: tuple[Score, ...]
    pictures: tuple[tuple[Path, str], ...]


def collect(artifacts: Mapping[str, Path]) -> Report:
    """Report on finished artifacts, given in the order of the graph. The last one that has numbers is the source."""
    source, metrics = None, dict[str, float]()
    carried: dict[str, float] = {}
    for stage, path in artifacts.items():
        if found := read_metrics(path):
            source, metrics = stage, found
            carried |= {CARRIED[stage, name][0]: value for name, value in found.items() if (stage, name) in CARRIED}
    if source == "evaluate":
        metrics = metrics | carried
    ladder = _ladder(metrics)
    rungs = {rung.name for rung in ladder}
    others = [name for name in metrics if name not in rungs]
    return Report(
        source=source,
        ladder=ladder,
        scores=tuple(Score(name=name, value=metrics[name], meaning=MEANINGS.get(name, "")) for name in others),
        pictures=tuple(
            (artifacts[stage] / VIEWS / name, meaning)
            for stage, name, meaning in PICTURES
            if stage in artifacts and (artifacts[stage] / VIEWS / name).is_file()
        ),
    )


def numbers(report: Report) -> dict[str, float]:
    """All numbers of a report by name."""
    return {score.name: score.value for score in (*report.ladder, *report.scores)}


def _ladder(metrics: Mapping[str, float]) -> tuple[Score, ...]:
    """Rungs of the ladder that were measured; empty without held-out images."""
    base = next((name for name in DISTANCES if name in metrics), "")
    rungs = {f"{base}_{rung}": meaning for rung, meaning in RUNGS.items()}
    return tuple(
        Score(name=name, value=metrics[name], meaning=meaning) for name, meaning in rungs.items() if name in metrics
    )
