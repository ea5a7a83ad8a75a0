"""View of stage `tokenize`: codebook usage."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from conf.runtime import RuntimeConfig
from conf.tokenize import TokenizeConfig
from stages.runtime.artifact import write_json
from stages.runtime.job import Inputs, main
from stages.stores.tokens import TokenStore


def tokenize(config: TokenizeConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `metrics.json`: sizes of the store and usage of the codebook."""
    write_json(output / "metrics.json", codebook_usage(TokenStore.of(inputs)))


def codebook_usage(store: TokenStore) -> dict[str, float]:
    """Sizes of the store, share of the codes that occur, and entropy of the code frequencies in nats."""
    counts = np.zeros(store.codebook_size, dtype=np.int64)
    for unit in range(store.num_units):
        for view in range(store.num_views):
            counts += np.bincount(store.read_block(unit, view).ravel(), minlength=store.codebook_size)
    shares = counts[counts > 0] / counts.sum()
    return {
        "num_images": store.num_images,
        "num_views": store.num_views,
        "num_tokens": store.num_tokens,
        "codebook_usage": float(np.mean(counts > 0)),
        "unigram_entropy": float(-(shares * np.log(shares)).sum()),
    }


if __name__ == "__main__":
    main(tokenize, TokenizeConfig)
