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

from conf.patch_index import PatchIndexConfig
from conf.schema import RuntimeConfig
from models.patch_tables import Bytes, PatchTables, pack_bits, unpack_bits
from models.patching import PatchRule, static_patch_starts
from stages.patches.rule import IndexRule, SavedRule
from stages.patches.thresholds import Entropies, EntropySample
from stages.runtime.artifact import write_json
from stages.runtime.job import Inputs, main
from stages.runtime.progress import Progress
from stages.stores.entropies import EntropyStore
from stages.stores.patches import PatchFacts, PatchIndex, write_patches
from stages.views.patch_figures import PatchHistograms

Mark = Callable[[Entropies], Bytes]


def patch_index(config: PatchIndexConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `patches.parquet`, the rule, its mean patch length, and histograms of patch lengths and entropies.

    Raises:
        InputError: No threshold gives the mean patch length that is wanted.
    """
    store = EntropyStore.of(inputs)
    sample = EntropySample.of(store)
    threshold = _threshold(config, store, sample)
    mark = _static(config, store) if threshold is None else _by_entropy(config, store, threshold)
    counts = Counts(store.num_tokens)
    rule = _index_rule(config, store, threshold)
    facts = PatchFacts(
        num_images=store.num_images,
        num_views=store.num_views,
        num_tokens=store.num_tokens,
        entropies_digest=store.digest,
        tokens_digest=store.tokens_digest,
    )
    write_patches(
        output / PatchIndex.FILE,
        facts,
        _blocks(store, mark, counts, Progress(output, "views", store.num_images * store.num_views)),
        rule={name: str(value) for name, value in rule.fields().items()},
        chunk_rows=store.facts.chunk_rows,
    )
    SavedRule.save(output, rule, counts.mean_length("training"))
    write_json(output / "metrics.json", counts.metrics() | ({} if threshold is None else {"threshold": threshold}))
    histograms = PatchHistograms(store.num_tokens, math.log(store.codebook_size))
    for block in sample.blocks:
        histograms.add(unpack_bits(mark(block), store.num_tokens), block)
    histograms.draw(threshold, output / "histograms.png")


@dataclass
class Counts:
    """What is counted while the index is written."""

    num_tokens: int
    patches: dict[str, int] = field(default_factory=lambda: {"training": 0, "heldout": 0})
    views: dict[str, int] = field(default_factory=lambda: {"training": 0, "heldout": 0})

    def add(self, masks: Bytes, num_train: int) -> None:
        """Count a block; its first `num_train` rows are training images."""
        for part, rows in (("training", masks[:num_train]), ("heldout", masks[num_train:])):
            self.patches[part] += int(np.bitwise_count(rows).sum())
            self.views[part] += len(rows)

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


def _blocks(store: EntropyStore, mark: Mark, counts: Counts, progress: Progress) -> Iterator[Bytes]:
    """Patch starts, view by view and in each view row-block by row-block."""
    for view in range(store.num_views):
        for unit in range(store.num_units):
            masks = mark(store.read_block(unit, view))
            counts.add(masks, max(0, store.num_train - store.rows(unit).start))
            yield masks
            progress.update(progress.done + len(masks))


def _by_entropy(config: PatchIndexConfig, store: EntropyStore, threshold: float) -> Mark:
    return PatchTables.of(_rule(config, store, threshold), store.num_tokens).packed_starts


def _rule(config: PatchIndexConfig, store: EntropyStore, threshold: float) -> PatchRule:
    return PatchRule(
        threshold=threshold, max_length=config.max_length, row_boundary=config.row_boundary, grid=store.grid
    )


def _index_rule(config: PatchIndexConfig, store: EntropyStore, threshold: float | None) -> IndexRule:
    if config.mode == "entropy":
        assert threshold is not None  # the schema asks for one, or for what it is found by
        return IndexRule.by_entropy(_rule(config, store, threshold))
    assert config.static_length is not None  # the schema ties it to the mode
    return IndexRule.static(config.static_length)


def _static(config: PatchIndexConfig, store: EntropyStore) -> Mark:
    assert config.static_length is not None  # the schema ties it to the mode
    mask = pack_bits(static_patch_starts(config.static_length, store.num_tokens).numpy())
    return lambda entropies: np.broadcast_to(mask, (len(entropies), len(mask)))


def _threshold(config: PatchIndexConfig, store: EntropyStore, sample: EntropySample) -> float | None:
    """The threshold in nats, rounded to float32 like the entropies it is compared with; None for static patches."""
    if config.threshold is not None:
        return float(np.float32(config.threshold))
    if config.target_mean_length is None:
        return None
    return sample.find_threshold(config.target_mean_length, _rule(config, store, math.nan), "patch_index")


if __name__ == "__main__":
    main(patch_index, PatchIndexConfig)
