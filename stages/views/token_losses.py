"""Held-out loss of a token model, and of a per-position unigram model as a baseline."""

from __future__ import annotations

from pathlib import Path

from stages.runtime.artifact import write_json
from stages.scores.unigram import best_unigram_loss
from stages.stores.tokens import TokenStore
from stages.views.record import last_metrics


def write_losses(output: Path, artifact: Path, store: TokenStore, first_position: int) -> None:
    """Write `metrics.json` with the model's held-out loss and, if images are held out, the best unigram loss on them.

    Args:
        output: Folder of the view.
        artifact: The model's artifact, whose record holds the held-out loss.
        store: Tokens that the model was trained on.
        first_position: First position that the model predicts, so that both losses cover the same tokens.
    """
    metrics = last_metrics(artifact, "heldout_loss")
    if store.num_train < len(store):
        train, heldout = store.training_blocks(), store.heldout_blocks()
        metrics["unigram_loss"] = best_unigram_loss(train, heldout, store.codebook_size, first_position)
    write_json(output / "metrics.json", metrics)
