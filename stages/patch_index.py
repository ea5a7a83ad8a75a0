"""Stage patch_index: which tokens open a patch, from the entropies and a rule, as one bit a token in Parquet.

The index is a function of the stored entropies: an entropy model run again elsewhere may differ in its last bits, and
a boundary with it.

Source: paper, section 3.1, Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from conf.schema import PatchIndexConfig, RuntimeConfig
from models.patching import PatchRule, patch_starts, static_patch_starts
from stages.artifact import write_json
from stages.errors import InputError
from stages.job import Inputs, main
from stages.progress import Progress
from stages.stores.entropies import EntropyStore
from stages.stores.patches import PatchFacts, write_patches

SEARCH_ROWS = 65536  # views that the search for a threshold looks at: the mean of so many is known to about 0.1 %
SEARCH_BLOCK = 4096  # of them at a time, which bounds the memory of the rule's intermediate arrays
ENTROPY_BINS = 100

Entropies = NDArray[np.float32]
Starts = NDArray[np.bool_]
Mark = Callable[[Entropies], Starts]


def patch_index(config: PatchIndexConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `patches.parquet`, the rule, its mean patch length, and histograms of patch lengths and entropies.

    Raises:
        InputError: No threshold gives the mean patch length that is wanted.
    """
    store = EntropyStore.open(inputs["entropy_map"] / "entropies.zarr")
    threshold = _threshold(config, store)
    mark = _static(config, store) if threshold is None else _by_entropy(config, store, threshold)
    counts = Counts(store.num_tokens, store.codebook_size)
    rule = {
        "mode": config.mode,
        "threshold": threshold,
        "threshold_hex": None if threshold is None else threshold.hex(),
        "max_length": None if threshold is None else config.max_length,
        "row_boundary": threshold is not None and config.row_boundary,
        "static_length": config.static_length,
    }
    facts = PatchFacts(
        num_images=store.num_images,
        num_views=store.num_views,
        num_tokens=store.num_tokens,
        entropies_digest=store.digest,
        tokens_digest=store.tokens_digest,
    )
    write_patches(
        output / "patches.parquet",
        facts,
        _blocks(store, mark, counts, Progress(output, "views", store.num_images * store.num_views)),
        rule={name: str(value) for name, value in rule.items()},
        chunk_rows=store.facts.chunk_rows,
    )
    write_json(output / "rule.json", rule | {"mean_length": counts.mean_length("training")})
    write_json(output / "metrics.json", counts.metrics() | ({} if threshold is None else {"threshold": threshold}))
    _draw(counts, threshold, output / "histograms.png")


@dataclass
class Counts:
    """What is counted while the index is written."""

    num_tokens: int
    codebook_size: int
    patches: dict[str, int] = field(default_factory=lambda: {"training": 0, "heldout": 0})
    views: dict[str, int] = field(default_factory=lambda: {"training": 0, "heldout": 0})
    lengths: NDArray[np.int64] = field(init=False)
    """Patches of each length; place 0 stays empty."""
    entropies: NDArray[np.int64] = field(init=False)
    """Tokens by entropy, in bins of equal width up to the logarithm of the codebook size."""

    def __post_init__(self) -> None:
        self.lengths = np.zeros(self.num_tokens + 1, dtype=np.int64)
        self.entropies = np.zeros(ENTROPY_BINS, dtype=np.int64)

    @property
    def max_entropy(self) -> float:
        """Entropy of a uniform guess, nats."""
        return math.log(self.codebook_size)

    def add(self, entropies: Entropies, starts: Starts, num_train: int) -> None:
        """Count a block; its first `num_train` rows are training images."""
        for part, rows in (("training", starts[:num_train]), ("heldout", starts[num_train:])):
            self.patches[part] += int(rows.sum())
            self.views[part] += len(rows)
        places = np.flatnonzero(starts)  # every row opens with a patch, so no length spans two rows
        self.lengths += np.bincount(np.diff(places, append=starts.size), minlength=self.num_tokens + 1)
        predicted = np.clip(entropies[:, 1:], 0.0, self.max_entropy)
        self.entropies += np.histogram(predicted, ENTROPY_BINS, (0.0, self.max_entropy))[0]

    def mean_length(self, part: str) -> float:
        """Tokens in a patch, on average over the patches of "training" or "heldout" images."""
        return self.num_tokens * self.views[part] / self.patches[part]

    def metrics(self) -> dict[str, float]:
        """Numbers that a person compares."""
        metrics = {
            "mean_length": self.mean_length("training"),
            "patches_per_image": self.patches["training"] / self.views["training"],
        }
        if self.views["heldout"]:
            metrics["heldout_mean_length"] = self.mean_length("heldout")
        return metrics


def _blocks(store: EntropyStore, mark: Mark, counts: Counts, progress: Progress) -> Iterator[Starts]:
    """Patch starts, view by view and in each view row-block by row-block."""
    for view in range(store.num_views):
        for unit in range(store.num_units):
            entropies = store.read_block(unit, view)
            starts = mark(entropies)
            counts.add(entropies, starts, max(0, store.num_train - store.rows(unit).start))
            yield starts
            progress.update(progress.done + len(starts))


def _by_entropy(config: PatchIndexConfig, store: EntropyStore, threshold: float) -> Mark:
    rule = PatchRule(
        threshold=threshold, max_length=config.max_length, row_boundary=config.row_boundary, grid=store.grid
    )
    return lambda entropies: patch_starts(rule, torch.from_numpy(np.array(entropies))).numpy()


def _static(config: PatchIndexConfig, store: EntropyStore) -> Mark:
    assert config.static_length is not None  # the schema ties it to the mode
    starts = static_patch_starts(config.static_length, store.num_tokens).numpy()
    return lambda entropies: np.broadcast_to(starts, entropies.shape)


def _threshold(config: PatchIndexConfig, store: EntropyStore) -> float | None:
    """The threshold in nats, rounded to float32 like the entropies it is compared with; None for static patches."""
    if config.threshold is not None:
        return float(np.float32(config.threshold))
    return None if config.target_mean_length is None else _search(config, store, config.target_mean_length)


def _search(config: PatchIndexConfig, store: EntropyStore, target: float) -> float:
    """The threshold whose mean patch length comes closest to `target`, by bisection down to neighbouring floats.

    A higher threshold never makes more patches, so bisection holds. Training images only, evenly spread when there are
    more views of them than SEARCH_ROWS.
    """
    total = store.num_train * store.num_views
    rows = np.linspace(0, total - 1, min(total, SEARCH_ROWS)).astype(np.int64)
    entropies = store.fetch(rows % store.num_train, rows // store.num_train)
    blocks = np.split(entropies, range(SEARCH_BLOCK, len(entropies), SEARCH_BLOCK))

    def mean_length(threshold: float) -> float:
        mark = _by_entropy(config, store, threshold)
        return entropies.size / sum(int(mark(block).sum()) for block in blocks)

    low, high = 0.0, float(np.float32(math.log(store.codebook_size)))
    shortest, longest = mean_length(low), mean_length(high)
    if not shortest <= target <= longest:
        raise InputError(
            f"patch_index.target_mean_length is {target}, expected {shortest:.4f} to {longest:.4f}: what these "
            f"entropies allow with max_length {config.max_length} and row_boundary {config.row_boundary}"
        )
    while (middle := float(np.float32((low + high) / 2))) not in (low, high):
        if mean_length(middle) < target:
            low = middle
        else:
            high = middle
    return min(low, high, key=lambda threshold: abs(mean_length(threshold) - target))


def _draw(counts: Counts, threshold: float | None, path: Path) -> None:
    """Histograms of patch lengths and entropies, the same bytes for the same counts."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    longest = int(np.flatnonzero(counts.lengths)[-1])
    left.bar(range(1, longest + 1), counts.lengths[1 : longest + 1] / counts.lengths.sum(), color="tab:blue")
    left.set(
        xlabel="tokens in a patch", ylabel="share of the patches", title=f"mean {counts.mean_length('training'):.3f}"
    )
    edges = np.linspace(0.0, counts.max_entropy, ENTROPY_BINS + 1)
    right.stairs(counts.entropies / counts.entropies.sum(), edges, fill=True, color="tab:orange")
    right.set(xlabel="entropy of the next token, nats", ylabel="share of the tokens")
    if threshold is not None:
        right.axvline(threshold, color="black", linestyle="--")
        right.set_title(f"threshold {threshold:.4g}")
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main(patch_index, PatchIndexConfig)
