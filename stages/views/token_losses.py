"""Held-out loss of a token model, also by position, and of a per-position unigram model as a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from stages.runtime.artifact import read_json, write_atomic, write_json
from stages.scores.unigram import best_unigram_loss
from stages.stores.tokens import TokenStore
from stages.training.log import POSITIONS_FILE
from stages.views.record import last_metrics


def write_losses(output: Path, artifact: Path, store: TokenStore, first_position: int) -> None:
    """Write `metrics.json` with the model's held-out loss and, if images are held out, the best unigram loss on them.

    `heldout_by_position.png` shows where in the image the loss lies, if the record has it.

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
    if (artifact / POSITIONS_FILE).exists():
        _draw_positions(read_json(artifact / POSITIONS_FILE), store.grid, output / "heldout_by_position.png")


def _draw_positions(found: dict[str, Any], grid: int, path: Path) -> None:
    """Write a PNG of the losses (nats) on the grid of tokens, and of their means over the columns of each row."""
    losses = np.full(grid * grid, np.nan)
    losses[found["first_position"] :] = found["loss"]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    on_grid, by_row = figure.subplots(1, 2)
    shown = on_grid.imshow(losses.reshape(grid, grid), cmap="viridis")
    on_grid.set(xlabel="column of tokens", ylabel="row of tokens", title="held-out loss, nats")
    figure.colorbar(shown, ax=on_grid)
    by_row.plot(np.nanmean(losses.reshape(grid, grid), axis=1), marker="o", color="tab:blue")
    by_row.set(xlabel="row of tokens", ylabel="held-out loss, nats", title=f"mean {np.nanmean(losses):.4f}")
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=100, metadata={"Software": None}))
