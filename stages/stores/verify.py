"""Reading all of an artifact's stores and tables again: every damage found, by array, chunk and file.

Opening a store checks only sizes and metadata; this is the pass for disks and copies that are not trusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.errors import ArtifactError
from stages.stores.blocks import SpecOf, StoreHeader
from stages.stores.entropies import EntropyFacts
from stages.stores.patches import PatchIndex
from stages.stores.samples import SampleFacts
from stages.stores.tokens import TokenFacts
from stages.stores.units import CRC_BYTES, ArraySpec, StoreSpec, is_missing, metadata_keys, store_digest


class Damage(NamedTuple):
    """A file, and what is wrong with it."""

    file: Path
    what: str


STORES: dict[str, SpecOf] = {
    "tokens.zarr": lambda facts: TokenFacts(**facts).spec(),
    "entropies.zarr": lambda facts: EntropyFacts(**facts).spec(),
    "samples.zarr": lambda facts: SampleFacts(**facts).spec(),
}
PATCHES = "patches.parquet"
ORIGINS = {"tokens_digest": "tokens.zarr", "entropies_digest": "entropies.zarr"}
"""Facts that name the store something was made from, by its digest."""


def artifact_damage(artifact: Path, sources: Mapping[str, Path]) -> Iterator[Damage]:
    """All damage of the stores and tables of an artifact.

    Args:
        artifact: Its folder.
        sources: Folders of the artifacts it was made from, by any name, as far as they are still there: what it says of
            its origin must fit them.
    """
    for name, spec_of in STORES.items():
        if (artifact / name).exists():
            yield from store_damage(artifact / name, spec_of)
            yield from _other_origin(artifact / name / "zarr.json", lambda n=name: _facts(artifact / n), sources)
    for path in sorted(artifact.glob("*.parquet")):
        yield from parquet_damage(path)
    if (artifact / PATCHES).exists():
        yield from _other_origin(artifact / PATCHES, lambda: _patch_facts(artifact / PATCHES), sources)


def store_damage(path: Path, spec_of: SpecOf) -> Iterator[Damage]:
    """All damage of the store in the folder `path`: metadata, sizes, checksums, entries never written, digest."""
    try:
        header = StoreHeader.read(path, spec_of)
    except ArtifactError as error:
        yield Damage(path / "zarr.json", str(error))
        return
    found = list(chunk_damage(header))
    yield from found
    if not found and _digest(header) != header.digest:
        what = f"{path} does not have the digest {header.digest}: chunks or facts were swapped; run its stage again"
        yield Damage(path / "zarr.json", what)


def chunk_damage(header: StoreHeader) -> Iterator[Damage]:
    """Damage of single files of a store: all that one look at each of them can tell."""
    for array in header.spec.arrays:
        try:
            header.check_layout(array)
        except ArtifactError as error:
            yield Damage(header.path / array.name / "zarr.json", str(error))
        for unit in range(header.spec.num_units):
            for key in header.spec.chunk_keys(array, unit):
                if what := _damage_of(header, array, unit, key):
                    yield Damage(header.path / key, what)


def parquet_damage(path: Path) -> Iterator[Damage]:
    """Damage of a Parquet file, by row group and column; of the patch index also rows that do not fit together."""
    found = False
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                for name in file.schema_arrow.names:
                    try:
                        file.read_row_group(group, columns=[name])
                    except (OSError, ValueError, pa.ArrowException) as error:
                        found = True
                        text = f"column {name}, row group {group} of {path.name} (file {path}) is damaged ({error})"
                        yield Damage(path, text)
        if path.name == PATCHES and not found:
            PatchIndex.open(path, _patch_facts(path)["tokens_digest"])
    except (OSError, ValueError, KeyError, pa.ArrowException, ArtifactError) as error:
        yield Damage(path, f"{path} is damaged ({error})")


def _damage_of(header: StoreHeader, array: ArraySpec, unit: int, key: str) -> str | None:
    name = header.chunk_name(array, key)
    try:
        data = (header.path / key).read_bytes()
    except FileNotFoundError:
        return header.size_damage(array, key, None)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if what := header.size_damage(array, key, len(data)):
        return what
    values = memoryview(data)[:-CRC_BYTES]
    if google_crc32c.value(values) != int.from_bytes(data[-CRC_BYTES:], "little"):
        return f"{name} is damaged, its checksum differs: run its stage again"
    if array.missing is not None:
        rows = np.frombuffer(values, np.dtype(array.dtype).newbyteorder("<")).reshape(header.spec.chunk_rows, -1)
        if is_missing(rows[: header.spec.count_rows([unit])], array.missing).any():
            return f"{name} holds entries that were never written: run its stage again"
    return None


def _digest(header: StoreHeader) -> str:
    """The store's digest, computed from its files."""
    spec: StoreSpec = header.spec
    chunks = [key for array in spec.arrays for unit in range(spec.num_units) for key in spec.chunk_keys(array, unit)]
    hashes = {}
    for key in [*metadata_keys(spec), *chunks]:
        with (header.path / key).open("rb") as file:
            hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return store_digest(header.facts, hashes)
