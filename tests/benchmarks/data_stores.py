"""How fast a token store is read, beside one mapped file without checksums, chunks or metadata; and what it takes.

196,608 images of 16 x 16 tokens in 24 whole chunks; for opening, a store of ImageNet in 20 views.
"""

from __future__ import annotations

import argparse
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import zarr
from report import report
from synthetic import CHUNK_ROWS, TOKENS, lay_out_tokens, token_facts, write_tokens
from timing import interleaved

from pipeline.bench.gates import Gate, gate
from stages.stores.header import StoreHeader, reader_of
from stages.stores.tokens import TokenStore
from stages.stores.verify import STORES, chunk_damage

IMAGENET_IMAGES, IMAGENET_VIEWS = 1_281_167, 20
BATCH, BATCHES = 256, 200
ZARR_ROWS = 16
Item = TypeVar("Item")


def each(items: Sequence[Item], call: Callable[[Item], object]) -> Callable[[], None]:
    """A contender that makes a call with each of the items."""

    def run() -> None:
        for item in items:
            call(item)

    return run


def copy_blocks(store: TokenStore) -> None:
    """Read all blocks one after the other."""
    for unit in range(store.num_units):
        store.read_block(unit, 0).copy()


def read_figures(folder: Path, num_images: int, rounds: int) -> tuple[list[Gate], dict[str, float]]:
    """Random batches, whole blocks and checksums, each beside the least that any reader must do."""
    path = folder / "tokens.zarr"
    store = TokenStore.open(path)
    blocks = [store.read_block(unit, 0) for unit in range(store.num_units)]
    np.concatenate(blocks).tofile(folder / "one")
    one = np.memmap(folder / "one", np.uint16, mode="r", shape=(num_images, TOKENS))
    generator = np.random.default_rng(0)
    batches = [generator.integers(0, num_images, BATCH) for _ in range(BATCHES)]
    views = np.zeros(BATCH, dtype=np.int64)
    units = range(store.num_units)
    stored = zarr.open_group(path, mode="r")["tokens"]
    header = StoreHeader.read(path, reader_of(path), STORES["tokens.zarr"])
    files = sorted(file for file in path.glob("*/c/**/*") if file.is_file())
    found = interleaved(
        {
            "batches, store": each(batches, lambda rows: store.fetch(rows, views)),
            "batches, mapped file": each(batches, lambda rows: one[rows]),
            "rows, zarr": lambda: stored.oindex[np.sort(batches[0][:ZARR_ROWS]), 0],
            "blocks, store": lambda: copy_blocks(store),
            "blocks, mapped file": each(units, lambda unit: one[store.rows(unit)].copy()),
            "blocks, store just opened": lambda: copy_blocks(TokenStore.open(path)),
            "checksums": lambda: list(chunk_damage(path, header)),
            "reading": each(files, Path.read_bytes),
        },
        rounds,
    )
    batch_rates = {name: BATCH * BATCHES / found[f"batches, {name}"] for name in ("store", "mapped file")}
    readers = ("store", "store just opened", "mapped file")
    block_rates = {name: num_images / found[f"blocks, {name}"] for name in readers}
    disk = sum(file.stat().st_size for file in files if file.is_relative_to(path / "tokens"))
    return [
        gate(
            "random batches of 256, store / mapped file, speeds",
            batch_rates["store"] / batch_rates["mapped file"],
            ">",
            0.2,
        ),
        gate("whole blocks, store / mapped file, speeds", block_rates["store"] / block_rates["mapped file"], ">", 0.8),
        gate("bytes of the tokens on disk / raw uint16", disk / (num_images * TOKENS * 2), "<", 1.01),
    ], {
        **{f"random batches, {name}, images/s": rate for name, rate in batch_rates.items()},
        **{f"whole blocks, {name}, images/s": rate for name, rate in block_rates.items()},
        "random rows, store / zarr, speeds": batch_rates["store"] / (ZARR_ROWS / found["rows, zarr"]),
        "checking all checksums / reading all files, speeds": found["reading"] / found["checksums"],
        "checking all checksums, GB/s": sum(file.stat().st_size for file in files) / found["checksums"] / 1e9,
    }


def open_figures(folder: Path, rounds: int) -> tuple[list[Gate], dict[str, float]]:
    """Time and Python memory to open ImageNet's store; what padding its last chunks takes."""
    lay_out_tokens(folder / "large.zarr", IMAGENET_IMAGES, IMAGENET_VIEWS)
    seconds = interleaved({"open": lambda: TokenStore.open(folder / "large.zarr")}, rounds)["open"]
    tracemalloc.start()
    store = TokenStore.open(folder / "large.zarr")
    memory, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    spec = token_facts(IMAGENET_IMAGES, IMAGENET_VIEWS).spec()
    return [
        gate("opening ImageNet's store, s", seconds, "<", 1.0),
    ], {
        "ImageNet's store: Python memory when open, MB": memory / 1e6,
        "ImageNet's store: Python memory, peak, MB": peak / 1e6,
        "ImageNet's store: labels alone, MB": store.labels.nbytes / 1e6,
        "ImageNet's store: stored rows / images": spec.num_units * spec.chunk_rows / IMAGENET_IMAGES,
    }


def main() -> None:
    """Measure and print what was found."""
    parser = argparse.ArgumentParser(description="Reading and opening of token stores.")
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    num_images = options.chunks * CHUNK_ROWS
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder) / "tokens.zarr", num_images)
        parts = [read_figures(Path(folder), num_images, options.rounds), open_figures(Path(folder), options.rounds)]
    report([found for gates, _ in parts for found in gates], {"token store": parts[0][1] | parts[1][1]})


if __name__ == "__main__":
    main()
