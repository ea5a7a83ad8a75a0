"""How fast patches are found and batches made, beside what the machine can do at all; and what the index takes.

200,000 images of 16 x 16 tokens, made up: uncertainty that varies between images and is alike among neighbours, with
the threshold that gives patches of 1.94 tokens on average.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from report import report
from synthetic import CHUNK_ROWS, CODEBOOK, GRID, TOKENS, write_tokens
from timing import interleaved

from conf.patch_index import PatchIndexConfig
from conf.runtime import RuntimeConfig
from models.packed_patches import pack_patches
from models.patch_tables import PatchTables
from models.patching import PatchRule
from pipeline.bench.gates import Figures, Gate, gate
from stages.patch_index import patch_index
from stages.runtime.artifact import read_json
from stages.stores.blocks import MappedArray, open_store
from stages.stores.entropies import EntropyFacts, EntropyStore, entropy_writer
from stages.stores.patches import PatchIndex, write_patches
from stages.stores.tokens import TokenStore
from stages.stores.verify import STORES
from stages.training.patched import PatchedData
from stages.training.stream import Part, SampleStream

MEAN_LENGTH = 1.94
NAIVE_IMAGES = 64
Entropies = npt.NDArray[np.float32]
CPU = torch.device("cpu")


def make_stores(folder: Path, num_images: int) -> None:
    """Write tokens.zarr and entropies.zarr below `folder`."""
    generator = np.random.default_rng(0)
    facts = EntropyFacts(
        num_images=num_images,
        num_train=num_images,
        num_views=1,
        num_tokens=TOKENS,
        grid=GRID,
        chunk_rows=CHUNK_ROWS,
        codebook_size=CODEBOOK,
        tokens_digest=write_tokens(folder / "tokens.zarr", num_images),
        model_sha256="m" * 64,
        precision="float32",
    )
    entropies = entropy_writer(folder / "entropies.zarr", facts)
    for unit in entropies.pending():
        entropies.write(unit, entropy=make_entropies(entropies.spec.count_rows([unit]), generator)[:, None])
    entropies.finish()


def make_entropies(num_images: int, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """Entropies (n, T), nats: a level for each image, a coarse field in it, and noise."""
    field = generator.normal(size=(num_images, 4, 4)).repeat(4, axis=1).repeat(4, axis=2).reshape(num_images, -1)
    noise = generator.normal(size=(num_images, TOKENS))
    level = generator.normal(size=(num_images, 1))
    return np.clip(7.5 + 0.5 * level + 0.7 * field + 0.5 * noise, 0, np.log(CODEBOOK)).astype(np.float32)


def naive_starts(entropies: list[float], threshold: float, max_length: int) -> list[bool]:
    """Algorithm 1 of the paper, one token after the other."""
    starts, length = [True, True], 1
    for i in range(2, len(entropies)):
        goes_on = entropies[i] <= threshold and length < max_length and i % GRID != 0
        starts.append(not goes_on)
        length = length + 1 if goes_on else 1
    return starts


def rule_figures(store: EntropyStore, rule: PatchRule, rounds: int) -> tuple[list[Gate], dict[str, float]]:
    """Algorithm 1 on one row-block, beside reading its entropies once and beside a Python loop."""
    block = store.read_block(0, 0)
    rows = block[:NAIVE_IMAGES].tolist()
    tables = PatchTables.of(rule, TOKENS)
    seconds = interleaved(
        {
            "read": lambda: block.sum(),
            "rule": lambda: tables.packed_starts(block),
            "naive": lambda: [naive_starts(row, rule.threshold, rule.max_length) for row in rows],
        },
        rounds,
    )
    rule_rate, naive_rate = len(block) / seconds["rule"], NAIVE_IMAGES / seconds["naive"]
    return [
        gate("patch rule / one read pass over the entropies, speeds", seconds["read"] / seconds["rule"], ">", 0.2),
        gate("patch rule / Python loop, speeds", rule_rate / naive_rate, ">", 50),
    ], {"patch rule, images/s": rule_rate, "one read pass, images/s": len(block) / seconds["read"]}


def check_figures(folder: Path, index: PatchIndex, rule: PatchRule, rounds: int) -> tuple[list[Gate], dict[str, float]]:
    """What comparing chunks with their checksums adds to passes over the entropies of a store just opened."""
    tables = PatchTables.of(rule, TOKENS)
    path = folder / "again.parquet"
    passes: dict[str, Callable[[Iterator[Entropies]], object]] = {
        "copy": lambda blocks: [block.copy() for block in blocks],
        "mean": lambda blocks: [block[:, 1:].sum(dtype=np.float64) for block in blocks],
        "rule": lambda blocks: [tables.packed_starts(block) for block in blocks],
        "index": lambda blocks: write_patches(
            path, index.facts, map(tables.packed_starts, blocks), rule={}, chunk_rows=CHUNK_ROWS
        ),
    }

    def read(work: Callable[[Iterator[Entropies]], object], *, trusted: bool) -> None:
        array = open_store(folder / "entropies.zarr", STORES["entropies.zarr"]).arrays["entropy"]
        assert isinstance(array, MappedArray)
        array.known_good[:] = trusted
        work(array.block(unit) for unit in range(array.header.spec.num_units))

    contenders = {name: partial(read, work, trusted=False) for name, work in passes.items()}
    contenders |= {f"{name}, trusted": partial(read, work, trusted=True) for name, work in passes.items()}
    found = interleaved(contenders, rounds)
    added = {name: found[name] / found[f"{name}, trusted"] - 1 for name in passes}
    return [
        gate("checksums / reading, cutting into patches and writing, as patch_index must", added["index"], "<", 0.2),
    ], {
        "checksums / cutting into patches alone": added["rule"],
        "checksums / a pass for the mean entropy": added["mean"],
        "checksums / a bare copy of the entropies": added["copy"],
    }


def index_figures(path: Path, num_images: int) -> tuple[list[Gate], dict[str, float]]:
    """Bytes that the patch starts of an image take, in memory and on disk."""
    metadata = pq.ParquetFile(path).metadata
    starts = [metadata.row_group(group).column(3) for group in range(metadata.num_row_groups)]
    plain, packed = (
        sum(getattr(column, name) for column in starts) / num_images
        for name in ("total_uncompressed_size", "total_compressed_size")
    )
    return [
        gate("patch starts, bytes an image, plain", plain, "<", 33),
        gate("patches.parquet, bytes an image", path.stat().st_size / num_images, "<", 26),
    ], {"patch starts, bytes an image, compressed": packed}


def loader_figures(data: PatchedData, rounds: int) -> tuple[list[Gate], dict[str, float]]:
    """Packing of a batch beside copying its tokens, and whole batches of the loader, in one thread."""
    starts = torch.from_numpy(data.index.starts(np.arange(256), np.zeros(256, dtype=np.int64)))
    tokens = torch.zeros(256, TOKENS, dtype=torch.int64)
    target = torch.empty_like(tokens)
    streams = {size: SampleStream(data.store.num_train, size, seed=0) for size in (32, 256)}
    steps = {size: iter(range(10**9)) for size in streams}
    seconds = interleaved(
        {
            "copy": lambda: target.copy_(tokens),
            "pack": lambda: pack_patches(starts),
            "loader 32": lambda: data.training_batch(streams[32], next(steps[32]), Part(0, 32), CPU),
            "loader 256": lambda: data.training_batch(streams[256], next(steps[256]), Part(0, 256), CPU),
        },
        20 * rounds,
    )
    rates = {f"loader, batches of {size}, images/s": size / seconds[f"loader {size}"] for size in streams}
    return [
        gate("packing / copying the tokens, batch 256, speeds", seconds["copy"] / seconds["pack"], ">", 0.04),
        gate("loader, batches of 32, images/s", 32 / seconds["loader 32"], ">", 50_000),
    ], rates | {"packing, batch 256, images/s": 256 / seconds["pack"]}


def measure(folder: Path, num_images: int, rounds: int) -> tuple[list[Gate], Figures]:
    """Gates and figures, from stores and an index made below `folder`."""
    make_stores(folder, num_images)
    store = EntropyStore.open(folder / "entropies.zarr")
    config = PatchIndexConfig(target_mean_length=MEAN_LENGTH)
    patch_index(config, {"entropy_map": folder}, folder, RuntimeConfig())
    rule = PatchRule(read_json(folder / "rule.json")["threshold"], config.max_length, config.row_boundary, GRID)
    tokens = TokenStore.open(folder / "tokens.zarr")
    index = PatchIndex.open(folder / "patches.parquet", tokens.digest)
    parts = [
        rule_figures(store, rule, rounds),
        check_figures(folder, index, rule, rounds),
        index_figures(index.path, num_images),
        loader_figures(PatchedData(tokens, index), rounds),
    ]
    figures = {"mean patch length": read_json(folder / "rule.json")["mean_length"]}
    for _, more in parts:
        figures |= more
    return [found for gates, _ in parts for found in gates], {"one thread": figures}


def main() -> None:
    """Measure and print what was found."""
    parser = argparse.ArgumentParser(description="Speed of the patch index and of the loader.")
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report(*measure(Path(folder), options.images, options.rounds))


if __name__ == "__main__":
    main()
