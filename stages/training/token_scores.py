"""What a token model's training says for itself: its held-out loss beside that of a model that knows only positions."""

from __future__ import annotations

from pathlib import Path

from stages.runtime.artifact import write_json
from stages.scores.unigram import best_unigram_loss
from stages.training.data import TokenData


def write_scores(output: Path, metrics: dict[str, float], data: TokenData, first_position: int) -> None:
    """Write `metrics.json`; with held-out images it holds the best per-position unigram loss on them too.

    `first_position` is the first position that the model predicts, so that both losses are over the same tokens.
    """
    if data.store.num_train < len(data.store):
        train, heldout = data.store.training_blocks(), data.store.heldout_blocks()
        unigram = best_unigram_loss(train, heldout, data.store.codebook_size, first_position)
        metrics = metrics | {"unigram_loss": unigram}
    write_json(output / "metrics.json", metrics)
