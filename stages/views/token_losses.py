"""Held-out loss of a model of tokens, beside that of a model that knows positions alone."""

from __future__ import annotations

from pathlib import Path

from stages.runtime.artifact import write_json
from stages.scores.unigram import best_unigram_loss
from stages.stores.tokens import TokenStore
from stages.views.record import last_metrics


def write_losses(output: Path, artifact: Path, store: TokenStore, first_position: int) -> None:
    """Write `metrics.json`: the held-out loss and, with held-out images, the best per-position unigram loss on them.

    Args:
        output: Folder of the view.
        artifact: Of the model, whose training has measured its held-out loss.
        store: Tokens that it was trained on.
        first_position: First position that the model predicts, so that both losses are over the same tokens.
    """
    metrics = last_metrics(artifact, "heldout_loss")
    if store.num_train < len(store):
        train, heldout = store.training_blocks(), store.heldout_blocks()
        metrics["unigram_loss"] = best_unigram_loss(train, heldout, store.codebook_size, first_position)
    write_json(output / "metrics.json", metrics)
