"""Stage `patch_index`: the tokens that open a patch, from entropies and a rule, as one bit per token in Parquet.

The index depends on the stored entropies only. Running the entropy model again on another machine could change their
last bits, and with them a boundary. Static patches depend on the number of tokens only.

Source: paper, section 3.1, Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conf.patch_index import PatchIndexConfig
from conf.runtime import RuntimeConfig
from models.patch_tables import Bytes, PatchTables, pack_bits
from models.patching import PatchRule, static_patch_starts
from stages.patches.rule import IndexRule, SavedRule
from stages.patches.thresholds import EntropySample
from stages.runtime.job import Inputs, main
from stages.runtime.progress import Progress
from stages.stores.entropies import EntropyStore
from stages.stores.patches import PatchFacts, PatchIndex, write_patches
from stages.stores.tokens import TokenStore

Mark = Callable[[int, int], Bytes]
"""Patch starts of one unit in one view, as bits (rows, bytes)."""


def patch_index(config: PatchIndexConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `patches.parquet`, and `rule.json` with the rule and its mean patch length on training images.

    Raises:
        InputError: No threshold gives the requested mean patch length.
    """
    store: EntropyStore | TokenStore
    if config.mode == "static":
        store = TokenStore.of(inputs)
        threshold, mark = None, _static(config, store)
        digests = {"entropies_digest": "", "tokens_digest": store.digest}
    else:
        store = EntropyStore.of(inputs)
        threshold = _threshold(config, store)
        mark = _by_entropy(config, store, threshold)
        digests = {"entropies_digest": store.digest, "tokens_digest": store.tokens_digest}
    rule = _index_rule(config, store, threshold)
    facts = PatchFacts(num_images=store.num_images, num_views=store.num_views, num_tokens=store.num_tokens, **digests)
    counts = Counts()
    write_patches(
        output / PatchIndex.FILE,
        facts,
        _blocks(store, mark, counts, Progress(output, "views", store.num_images * store.num_views)),
        rule={name: str(value) for name, value in rule.fields().items()},
        chunk_rows=store.facts.chunk_rows,
    )
    SavedRule.save(output, rule, store.num_tokens * counts.views / counts.patches)


@dataclass
class Counts:
    """Number of views of training images, and of the patches in them."""

    views: int = 0
    patches: int = 0

    def add(self, masks: Bytes) -> None:
        """Count the rows of a block."""
        self.views += len(masks)
        self.patches += int(np.bitwise_count(masks).sum())


def _blocks(store: EntropyStore | TokenStore, mark: Mark, counts: Counts, progress: Progress) -> Iterator[Bytes]:
    """Patch starts as bits, view by view, and in each view one row-block at a time."""
    for view in range(store.num_views):
        for unit in range(store.num_units):
            masks = mark(unit, view)
            counts.add(masks[: max(0, store.num_train - store.rows(unit).start)])
            yield masks
            progress.update(progress.done + len(masks))


def _by_entropy(config: PatchIndexConfig, store: EntropyStore, threshold: float) -> Mark:
    starts = PatchTables.of(_rule(config, store, threshold), store.num_tokens).packed_starts
    return lambda unit, view: starts(store.read_block(unit, view))


def _rule(config: PatchIndexConfig, store: EntropyStore | TokenStore, threshold: float) -> PatchRule:
    return PatchRule(
        threshold=threshold, max_length=config.max_length, row_boundary=config.row_boundary, grid=store.grid
    )


def _index_rule(config: PatchIndexConfig, store: EntropyStore | TokenStore, threshold: float | None) -> IndexRule:
    if threshold is not None:
        return IndexRule.by_entropy(_rule(config, store, threshold))
    assert config.static_length is not None  # the schema ties it to the mode
    return IndexRule.static(config.static_length)


def _static(config: PatchIndexConfig, store: TokenStore) -> Mark:
    assert config.static_length is not None  # the schema ties it to the mode
    mask = pack_bits(static_patch_starts(config.static_length, store.num_tokens).numpy())

    def mark(unit: int, view: int) -> Bytes:
        rows = store.rows(unit)
        return np.broadcast_to(mask, (rows.stop - rows.start, len(mask)))

    return mark


def _threshold(config: PatchIndexConfig, store: EntropyStore) -> float:
    """Threshold in nats, rounded to float32 like the entropies."""
    if config.threshold is not None:
        return float(np.float32(config.threshold))
    assert config.target_mean_length is not None  # the schema asks for one of the two
    rule = _rule(config, store, math.nan)
    return EntropySample.of(store).find_threshold(config.target_mean_length, rule, "patch_index")


if __name__ == "__main__":
    main(patch_index, PatchIndexConfig)
