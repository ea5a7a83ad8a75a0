"""One flipped bit in any chunk of any array is an error wherever the chunk is read, and costs known chunks nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_facts import token_facts

from stages.runtime.errors import ArtifactError
from stages.stores import header
from stages.stores.entropies import EntropyFacts, EntropyStore, entropy_writer
from stages.stores.samples import SampleFacts, SampleStore, sample_writer
from stages.stores.tokens import TokenStore, token_writer
from stages.stores.units import UnitWriter

N, A, T, ROWS, V = 11, 2, 16, 4, 50
RNG = np.random.default_rng(0)
SIZES: dict[str, Any] = {"num_images": N, "num_train": 8, "num_views": A, "num_tokens": T, "grid": 4}
TOKEN_FACTS = token_facts(**SIZES, chunk_rows=ROWS, codebook_size=V)
ENTROPY_FACTS = EntropyFacts(
    **SIZES, chunk_rows=ROWS, codebook_size=V, tokens_digest="t", model_sha256="m", precision="float32"
)
SAMPLE_FACTS = SampleFacts(
    num_samples=N, num_classes=3, num_tokens=T, grid=4, codebook_size=V, image_size=8, chunk_rows=ROWS
)
TOKENS = RNG.integers(0, V, (N, A, T)).astype(np.uint16)
ALL_ROWS, ALL_VIEWS = np.arange(N).repeat(A), np.tile(np.arange(A), N)


def finish(writer: UnitWriter, **arrays: np.ndarray) -> Path:
    for unit in writer.pending():
        writer.write(unit, **{name: values[writer.spec.rows(unit)] for name, values in arrays.items()})
    writer.finish()
    return writer.path


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    labels = RNG.integers(0, 3, N).astype(np.uint16)
    return {
        "tokens": finish(token_writer(folder / "tokens.zarr", TOKEN_FACTS), tokens=TOKENS, labels=labels),
        "entropies": finish(
            entropy_writer(folder / "entropies.zarr", ENTROPY_FACTS),
            entropy=RNG.uniform(0, 9, (N, A, T)).astype(np.float32),
        ),
        "samples": finish(
            sample_writer(folder / "samples.zarr", SAMPLE_FACTS),
            images=RNG.integers(0, 256, (N, 8, 8, 3)).astype(np.uint8),
            labels=labels,
            tokens=TOKENS[:, 0],
            patch_starts=RNG.random((N, T)) < 0.5,
        ),
    }


def read_blocks(store: TokenStore | EntropyStore) -> None:
    for unit in range(store.num_units):
        for view in range(A):
            store.read_block(unit, view)


READS: dict[str, dict[str, Callable[[Path], object]]] = {
    "tokens": {
        "blocks": lambda path: read_blocks(TokenStore.open(path)),
        "rows": lambda path: TokenStore.open(path).fetch(ALL_ROWS, ALL_VIEWS),
    },
    "entropies": {
        "blocks": lambda path: read_blocks(EntropyStore.open(path)),
        "rows": lambda path: EntropyStore.open(path).fetch(ALL_ROWS, ALL_VIEWS),
    },
    "samples": {
        "blocks": lambda path: list(SampleStore.open(path).blocks()),
        "rows": lambda path: SampleStore.open(path).images(np.arange(N)),
    },
}
CASES = [(store, way) for store, ways in READS.items() for way in ways]


def flips(data: bytes) -> Iterator[bytes]:
    """The file with one bit flipped: in the first and last of its rows and in each byte of its checksum."""
    for place in (0, len(data) // 2, len(data) - 5, *range(len(data) - 4, len(data))):
        yield data[:place] + bytes([data[place] ^ 1 << int(RNG.integers(8))]) + data[place + 1 :]


def error_of(read: Callable[[Path], object], path: Path) -> str:
    """Message of the error that reading raises; empty if it raises none."""
    try:
        read(path)
    except ArtifactError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("store", "way"), CASES)
def test_a_flipped_bit_in_any_chunk_is_an_error_that_names_it(stores: dict[str, Path], store: str, way: str) -> None:
    path, read, tried = stores[store], READS[store][way], 0
    chunks = sorted(file for file in path.glob("*/c/**/*") if file.is_file())
    for chunk in chunks:
        whole = chunk.read_bytes()
        array, number = chunk.relative_to(path).as_posix().split("/c/")
        for damaged in flips(whole):
            chunk.write_bytes(damaged)
            tried += 1
            assert error_of(read, path) == (
                f"array {array}, chunk {number} of {path.name} (file {chunk}) is damaged, its checksum differs: "
                "run its stage again"
            )
        chunk.write_bytes(whole)
    assert tried == 7 * len(chunks) == 7 * {"tokens": 3 * A + 3, "entropies": 3 * A, "samples": 4 * 3}[store]
    assert error_of(read, path) == ""


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Length of each file whose checksum was computed."""
    lengths: list[int] = []
    original = header.google_crc32c.value
    monkeypatch.setattr(header.google_crc32c, "value", lambda data: lengths.append(len(data)) or original(data))
    return lengths


def test_a_chunk_is_checked_once_and_only_if_it_is_read(stores: dict[str, Path], checked: list[int]) -> None:
    store = TokenStore.open(stores["tokens"])
    assert checked == [ROWS * 2 + 4] * 3  # the labels, which are read whole
    checked.clear()
    size = ROWS * T * 2 + 4
    rows, views = np.array([0, 3, 1, 9, 2]), np.array([1, 1, 1, 0, 1])  # chunks (0, 1) and (2, 0)
    for _ in range(2):
        assert np.array_equal(store.fetch(rows, views), TOKENS[rows, views])
        assert checked == [size] * 2
    assert np.array_equal(store.read_block(0, 1), TOKENS[:ROWS, 1])
    assert checked == [size] * 2
    store.read_block(1, 1)
    assert checked == [size] * 3
    store.fetch(ALL_ROWS, ALL_VIEWS)
    read_blocks(store)
    assert checked == [size] * 3 * A


def test_a_damaged_chunk_stays_an_error_and_does_not_hide_the_others(
    stores: dict[str, Path], checked: list[int]
) -> None:
    chunk = stores["tokens"] / "tokens/c/1/0/0"
    whole = chunk.read_bytes()
    chunk.write_bytes(next(flips(whole)))
    try:
        store = TokenStore.open(stores["tokens"])
        for _ in range(2):
            with pytest.raises(ArtifactError, match="chunk 1/0/0 of"):
                store.fetch(np.array([0, 5]), np.array([0, 0]))
            with pytest.raises(ArtifactError, match="chunk 1/0/0 of"):
                store.read_block(1, 0)
        others = (ALL_ROWS // ROWS != 1) | (ALL_VIEWS != 0)
        rows, views = ALL_ROWS[others], ALL_VIEWS[others]
        assert np.array_equal(store.fetch(rows, views), TOKENS[rows, views])
    finally:
        chunk.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel kills the process")
@pytest.mark.parametrize("read", ["block", "rows"])
def test_a_chunk_that_is_cut_after_opening_is_an_error(tmp_path: Path, read: str) -> None:
    """In another process, because a mapped page that the file no longer has may end it."""
    labels = RNG.integers(0, 3, 4 * N).astype(np.uint16)
    wide = replace(TOKEN_FACTS, num_images=4 * N, num_tokens=64 * T, chunk_rows=8 * ROWS)
    tokens = RNG.integers(0, V, (4 * N, A, 64 * T)).astype(np.uint16)
    path = finish(token_writer(tmp_path / "tokens.zarr", wide), tokens=tokens, labels=labels)
    script = f"""
import os
import numpy as np
from stages.stores.tokens import TokenStore
store = TokenStore.open({str(path)!r})
os.truncate({str(path / "tokens/c/0/1/0")!r}, 5000)
try:
    store.read_block(0, 1) if {read == "block"} else store.fetch(np.array([0, 20]), np.array([1, 1]))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        f"ArtifactError array tokens, chunk 0/1/0 of tokens.zarr (file {path}/tokens/c/0/1/0)"
    )
    assert "cannot be read" in done.stdout
