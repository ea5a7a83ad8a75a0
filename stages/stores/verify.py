"""Full check of an artifact's stores and tables. Every file is read; damage is reported by array, chunk and file.

Opening a store checks sizes and metadata, and reading a chunk checks that chunk. Only this check reads all chunks,
checks their values, and finds chunks that were swapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.runtime.artifact import file_sha256
from stages.runtime.errors import ArtifactError
from stages.stores.entropies import EntropyFacts, EntropyStore
from stages.stores.header import SpecOf, StoreHeader, reader_of
from stages.stores.layout import CRC_BYTES, ArraySpec, metadata_keys, store_digest, value_damage
from stages.stores.patches import PatchIndex
from stages.stores.samples import SampleFacts, SampleStore
from stages.stores.tokens import TokenFacts, TokenStore


class Damage(NamedTuple):
    """A damaged file, and a description of the damage."""

    file: Path
    what: str


STORES: dict[str, SpecOf] = {
    TokenStore.FILE: lambda facts: TokenFacts(**facts).spec(),
    EntropyStore.FILE: lambda facts: EntropyFacts(**facts).spec(),
    SampleStore.FILE: lambda facts: SampleFacts(**facts).spec(),
}
PATCHES = PatchIndex.FILE
ORIGINS = {"entropies_digest": EntropyStore.FILE, "tokens_digest": TokenStore.FILE}
"""Metadata fields with the digest of a source store, and the name of that store."""


def artifact_damage(artifact: Path, sources: Iterable[Path]) -> Iterator[Damage]:
    """All damage of the stores and tables of an artifact.

    Args:
        artifact: Folder of the artifact.
        sources: Folders of the source artifacts that still exist. Their digests must match the artifact's metadata.
    """
    claims: dict[Path, Mapping[str, Any]] = {}
    for name, spec_of in STORES.items():
        if (artifact / name).exists():
            yield from store_damage(artifact / name, spec_of)
            claims[artifact / name / "zarr.json"] = _facts(artifact / name, spec_of)
    for path in sorted(artifact.glob("*.parquet")):
        yield from parquet_damage(path)
        claims[path] = _text_facts(path)
    origins = _digests(sources)
    for path, facts in claims.items():
        for fact in sorted(facts.keys() & origins.keys()):
            if facts[fact] != origins[fact]:
                what = (
                    f"{path} was made from {fact} {facts[fact]}, but the digest of the source store is {origins[fact]}"
                )
                yield Damage(path, what)


def store_damage(path: Path, spec_of: SpecOf) -> Iterator[Damage]:
    """All damage of the store in the folder `path`: metadata, sizes, checksums, values, digest."""
    try:
        header = StoreHeader.read(path, reader_of(path), spec_of)
    except ArtifactError as error:
        yield Damage(path / "zarr.json", str(error))
        return
    found = list(chunk_damage(path, header))
    yield from found
    if not found and _digest(path, header) != header.digest:
        what = f"{path} does not have the digest {header.digest}: files were swapped or differ; run its stage again"
        yield Damage(path / "zarr.json", what)


def chunk_damage(path: Path, header: StoreHeader) -> Iterator[Damage]:
    """Damage of single files in a store."""
    for array in header.spec.arrays:
        try:
            header.check_layout(array, reader_of(path))
        except ArtifactError as error:
            yield Damage(path / array.name / "zarr.json", str(error))
            continue  # without the array's metadata its chunks are unknown
        for unit in range(header.spec.num_units):
            for key in header.spec.chunk_keys(array, unit):
                if what := _damage_of(path, header, array, unit, key):
                    yield Damage(path / key, what)


def parquet_damage(path: Path) -> Iterator[Damage]:
    """Damage of a Parquet file, by row group and column. For the patch index, the order of its rows is checked too."""
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
            PatchIndex.open(path, _text_facts(path)["tokens_digest"])
    except (OSError, ValueError, KeyError, pa.ArrowException, ArtifactError) as error:
        yield Damage(path, f"{path} is damaged ({error})")


def _damage_of(path: Path, header: StoreHeader, array: ArraySpec, unit: int, key: str) -> str | None:
    name = header.chunk_name(array, key)
    try:
        data = (path / key).read_bytes()
    except FileNotFoundError:
        return header.size_damage(array, key, None)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if what := header.content_damage(array, key, data):
        return what
    dtype = np.dtype(array.dtype).newbyteorder("<")
    values = np.frombuffer(data, dtype, count=(len(data) - CRC_BYTES) // dtype.itemsize)
    rows = values.reshape(header.spec.chunk_rows, -1)
    what = value_damage(array, rows[: header.spec.count_rows([unit])])
    return f"{name} {what}: run its stage again" if what else None


def _digest(path: Path, header: StoreHeader) -> str:
    """The store's digest, computed from its files."""
    spec = header.spec
    keys = [*metadata_keys(spec), *(key for array in spec.arrays for key in spec.keys(array))]
    return store_digest(header.facts, {key: file_sha256(path / key) for key in keys})


def _digests(sources: Iterable[Path]) -> dict[str, str]:
    """Digests of the stores in some artifacts, and of the source stores in their metadata, by the keys of ORIGINS."""
    found: dict[str, str] = {}
    for source in sources:
        for fact, name in ORIGINS.items():
            if facts := _facts(source / name, STORES[name]):
                found |= {fact: facts["digest"]} | {f: facts[f] for f in ORIGINS if f in facts}
    return found


def _facts(path: Path, spec_of: SpecOf) -> Mapping[str, Any]:
    """Metadata and digest of a store; empty if it is missing or cannot be read."""
    try:
        header = StoreHeader.read(path, reader_of(path), spec_of)
    except ArtifactError:
        return {}
    return header.facts | {"digest": header.digest}


def _text_facts(path: Path) -> Mapping[str, str]:
    """Metadata in the schema of a Parquet file; empty if it cannot be read."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        return {key.decode(): value.decode() for key, value in metadata.items()}
    except (OSError, ValueError, pa.ArrowException):
        return {}
