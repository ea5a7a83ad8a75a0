"""How fast a token store is read, beside one mapped file without checksums, chunks or metadata; and what it takes.

The cost of checksums is that of the first read of each chunk: stores just opened are read with and without it.

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
from synthetic import CHUNK_ROWS, CODEBOOK, TOKENS, lay_out_tokens, token_facts, write_tokens
from timing import interleaved

from pipeline.bench.gates import Gate, gate
from stages.stores.blocks import MappedArray, open_store
from stages.stores.header import StoreHeader, reader_of
from stages.stores.tokens import TokenStore
from stages.stores.verify import STORES, chunk_damage

IMAGENET_IMAGES, IMAGENET_VIEWS = 1_281_167, 20
BATCH, BATCHES = 256, 200
ZARR_ROWS = 16
# No training step of DPAR-B at 256 px is shorter: 3 x 19.21 GMAC an image, at the peak of an H100, 989 TFLOP/s.
LEAST_STEP_S_AN_IMAGE = 2 * 3 * 19.21e9 / 989e12
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


def just_opened(path: Path, *, trusted: bool) -> MappedArray:
    """The tokens of a store just opened: no chunk is known to be good, or all are taken to be."""
    array = open_store(path, STORES["tokens.zarr"]).arrays["tokens"]
    assert isinstance(array, MappedArray)
    array.known_good[:] = trusted
    return array


def copy_just_opened(path: Path, *, trusted: bool) -> None:
    """The least that reading a whole store can be: a copy of every block."""
    array = just_opened(path, trusted=trusted)
    for unit in range(array.header.spec.num_units):
        array.block(unit).copy()


def count_just_opened(path: Path, *, trusted: bool) -> None:
    """The pass that the tokenize stage makes over its store: how often each code occurs."""
    array = just_opened(path, trusted=trusted)
    for unit in range(array.header.spec.num_units):
        np.bincount(array.block(unit).ravel(), minlength=CODEBOOK)


def check_figures(path: Path, rounds: int) -> tuple[list[Gate], dict[str, float]]:
    """What comparing chunks with their checksums costs a pass over a store, and the training steps that read it."""
    array = just_opened(path, trusted=True)
    spec = array.header.spec
    chunks = np.random.default_rng(0).integers(0, spec.num_units, (BATCHES, BATCH))
    found = interleaved(
        {
            "copy": lambda: copy_just_opened(path, trusted=True),
            "copy, checked": lambda: copy_just_opened(path, trusted=False),
            "count": lambda: count_just_opened(path, trusted=True),
            "count, checked": lambda: count_just_opened(path, trusted=False),
            "known": each(list(chunks), lambda batch: array.known_good[batch].all()),
        },
        rounds,
    )
    added = {name: found[f"{name}, checked"] - found[name] for name in ("copy", "count")}
    a_chunk = max(added.values()) / spec.num_units
    imagenet = token_facts(IMAGENET_IMAGES, IMAGENET_VIEWS).spec().num_units * IMAGENET_VIEWS
    an_image, known = a_chunk * imagenet / IMAGENET_IMAGES, found["known"] / BATCHES
    return [
        gate(
            "checksums / a pass that counts the codes, as tokenize makes it", added["count"] / found["count"], "<", 0.2
        ),
        gate(
            "checksums of ImageNet in 20 views, over the first epoch / training steps of DPAR-B at an H100's peak",
            an_image / LEAST_STEP_S_AN_IMAGE,
            "<",
            0.05,
        ),
        gate(
            "looking up that the chunks of a batch of 256 are known / such a step",
            known / (BATCH * LEAST_STEP_S_AN_IMAGE),
            "<",
            0.05,
        ),
    ], {
        "checksums / a bare copy of all blocks": added["copy"] / found["copy"],
        "checksum of a chunk of 4 MiB, ms": 1000 * a_chunk,
        "looking up that the chunks of a batch of 256 are known, us": 1e6 * known,
        "ImageNet in 20 views: all checksums of a process, s": a_chunk * imagenet,
        "ImageNet in 20 views: checksums of the first batch of 256, at most, s": a_chunk * BATCH,
        "a training step on a batch of 256 at an H100's peak, s": BATCH * LEAST_STEP_S_AN_IMAGE,
    }


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
        parts = [
            read_figures(Path(folder), num_images, options.rounds),
            check_figures(Path(folder) / "tokens.zarr", options.rounds),
            open_figures(Path(folder), options.rounds),
        ]
    figures = {name: value for _, more in parts for name, value in more.items()}
    report([found for gates, _ in parts for found in gates], {"token store": figures})


if __name__ == "__main__":
    main()
