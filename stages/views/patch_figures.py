"""Figures about patches: patch lengths, token entropies, and number of patches against image complexity.

The same numbers give the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from stages.runtime.arrays import Entropies, Starts
from stages.runtime.artifact import write_atomic
from stages.runtime.randomness import Purpose, stream

ENTROPY_BINS = 100


class PatchHistograms:
    """Histograms of patch lengths and token entropies."""

    def __init__(self, num_tokens: int, max_entropy: float) -> None:
        self.max_entropy = max_entropy
        """Entropy of the uniform distribution, nats: the end of the scale."""
        self.lengths: NDArray[np.int64] = np.zeros(num_tokens + 1, dtype=np.int64)
        """Number of patches of each length; entry 0 stays zero."""
        self.entropies: NDArray[np.int64] = np.zeros(ENTROPY_BINS, dtype=np.int64)
        """Number of tokens in entropy bins of equal width, without first tokens, which have no prediction."""

    def add(self, starts: Starts, entropies: Entropies | None) -> None:
        """Count the patches and entropies (nats) of some images."""
        places = np.flatnonzero(starts)  # every image starts with a patch, so no length spans two images
        self.lengths += np.bincount(np.diff(places, append=starts.size), minlength=len(self.lengths))
        if entropies is None:
            return
        predicted = np.clip(entropies[:, 1:], 0.0, self.max_entropy)
        self.entropies += np.histogram(predicted, ENTROPY_BINS, (0.0, self.max_entropy))[0]

    @property
    def mean_length(self) -> float:
        """Tokens per patch, averaged over the patches."""
        return float(self.lengths @ np.arange(len(self.lengths)) / self.lengths.sum())

    def draw(self, threshold: float | None, path: Path) -> None:
        """Write both histograms as a PNG. A line marks the threshold (nats), if there is one."""
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        axes = figure.subplots(1, 2 if self.entropies.any() else 1, squeeze=False)[0]
        self._draw_lengths(axes[0])
        if self.entropies.any():
            self._draw_entropies(axes[1], threshold)
        _save(figure, path)

    def _draw_lengths(self, axes: Axes) -> None:
        longest = int(np.flatnonzero(self.lengths)[-1])
        axes.bar(range(1, longest + 1), self.lengths[1 : longest + 1] / self.lengths.sum(), color="tab:blue")
        axes.set(xlabel="tokens in a patch", ylabel="share of the patches", title=f"mean {self.mean_length:.3f}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    def _draw_entropies(self, axes: Axes, threshold: float | None) -> None:
        edges = np.linspace(0.0, self.max_entropy, ENTROPY_BINS + 1)
        axes.stairs(self.entropies / self.entropies.sum(), edges, fill=True, color="tab:orange")
        axes.set(xlabel="entropy of the next token, nats", ylabel="share of the tokens")
        if threshold is not None:
            axes.axvline(threshold, color="black", linestyle="--")
            axes.set_title(f"threshold {threshold:.4g}")


def draw_scatter(
    png_bytes: Int64[NDArray[np.int64], " n"],
    num_patches: Int64[NDArray[np.int64], " n"],
    correlation: float | None,
    path: Path,
) -> None:
    """Write a scatter plot as a PNG: number of patches of each image against the size of its PNG file in bytes."""
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axes = figure.subplots()
    # Patch counts are integers, so points would overlap: jitter moves them by less than half a patch.
    shift = stream(0, Purpose.SCATTER).uniform(-0.4, 0.4, len(num_patches))
    axes.scatter(png_bytes / 1000, num_patches + shift, s=8, alpha=0.35, linewidths=0, color="tab:blue")
    found = "correlation undefined: constant values" if correlation is None else f"correlation {correlation:.2f}"
    axes.set(xlabel="size as PNG, kB", ylabel="patches", title=f"{found}, {len(num_patches)} images")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=100, metadata={"Software": None}))
