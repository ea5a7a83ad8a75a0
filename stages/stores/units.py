"""Zarr stores that many processes write once: row-blocks as units of work, each chunk written whole by one process.

A unit is one block of rows of every array of the store. Chunks are neither compressed nor sharded, so that a chunk file
is the raw rows plus a CRC-32C, can be mapped into memory, and stays standard Zarr v3. A unit counts as done when its
manifest stands in `record/units`; that a file exists says nothing, for Zarr shows missing chunks as fill values. The
store counts as done when `complete` stands in its attributes, which are written last.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from stages.runtime.artifact import RECORD, file_sha256, read_json, remove_partials, write_atomic, write_json
from stages.runtime.errors import ArtifactError

Array = NDArray[Any]
FORMAT = 2
ATTRIBUTES = "dpar"
CRC_BYTES = 4
NOT_FACTS = frozenset({"format", "complete", "digest"})  # the attributes that say nothing of what is stored


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array of a store. Its first axis is the images."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Name of a little-endian type, e.g. `uint16`."""
    missing: float | None = None
    """NaN or the largest value of the type, if no finished entry has it: Zarr fills with it what was not written."""
    per_view: bool = False
    """The second axis is the views, each in chunks of its own."""

    def __post_init__(self) -> None:
        if self.missing is not None and not np.isnan(self.missing) and self.missing != np.iinfo(self.dtype).max:
            raise ValueError(
                f"{self.name} marks missing entries with {self.missing}, expected the largest {self.dtype}"
            )

    @property
    def num_views(self) -> int:
        """Chunks of one unit: one a view."""
        return self.shape[1] if self.per_view else 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row of one view."""
        return self.shape[2:] if self.per_view else self.shape[1:]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSpec:
    """The arrays of a store, and how their rows are cut into units."""

    arrays: tuple[ArraySpec, ...]
    chunk_rows: int

    @property
    def num_rows(self) -> int:
        """Images in the store."""
        return self.arrays[0].shape[0]

    @property
    def num_units(self) -> int:
        """Row-blocks of the store; the last one may be shorter."""
        return -(-self.num_rows // self.chunk_rows)

    def rows(self, unit: int) -> slice:
        """Rows of a unit."""
        return slice(unit * self.chunk_rows, min((unit + 1) * self.chunk_rows, self.num_rows))

    def count_rows(self, units: Iterable[int]) -> int:
        """Number of rows of some units together."""
        return sum(self.rows(unit).stop - self.rows(unit).start for unit in units)

    def chunk_shape(self, array: ArraySpec) -> tuple[int, ...]:
        """Shape of every chunk of an array, the last one included: Zarr pads it."""
        return (self.chunk_rows, *((1,) if array.per_view else ()), *array.row_shape)

    def chunk_bytes(self, array: ArraySpec) -> int:
        """Size of every chunk file of an array."""
        return math.prod(self.chunk_shape(array)) * np.dtype(array.dtype).itemsize + CRC_BYTES

    def chunk_keys(self, array: ArraySpec, unit: int) -> list[str]:
        """Files of a unit's chunks below the store, one a view where the array has views."""
        zeros = "/0" * len(array.row_shape)
        if not array.per_view:
            return [f"{array.name}/c/{unit}{zeros}"]
        return [f"{array.name}/c/{unit}/{view}{zeros}" for view in range(array.num_views)]

    def keys(self, array: ArraySpec) -> Iterator[str]:
        """Files of all chunks of an array, unit by unit, and in a unit view by view."""
        return (key for unit in range(self.num_units) for key in self.chunk_keys(array, unit))


class UnitWriter:
    """Writes the units of one store, in any order, from any number of processes.

    Every process makes one with the same arguments; making it again continues what a killed attempt left. The
    manifests lie in `record/units` beside the store.
    """

    def __init__(self, path: Path, spec: StoreSpec, facts: Mapping[str, Any]) -> None:
        """Create the store's metadata, or check that those found are the same.

        Args:
            path: Folder of the store, e.g. output/tokens.zarr.
            spec: Its arrays.
            facts: What it was made from, as plain JSON; becomes its attributes.

        Raises:
            ArtifactError: The folder holds the units of another store.
        """
        self.path, self.spec = path, spec
        self._facts = dict(facts)
        documents = _documents(spec, {"format": FORMAT, **facts, "complete": False})
        if not (path / "zarr.json").exists():
            # Processes that start together write the same bytes, the group's file last: no barrier is needed.
            for key in sorted(documents, key="zarr.json".__eq__):
                _write_bytes(path / key, documents[key])
        self._refuse_other_store(documents)

    def pending(self, rank: int = 0, size: int = 1) -> list[int]:
        """Units of one process of `size` that are not written yet: every `size`-th one, from `rank`."""
        return [unit for unit in range(rank, self.spec.num_units, size) if self._manifest(unit) is None]

    def write(self, unit: int, **blocks: Array) -> None:
        """Write one unit: every chunk once and whole, read back, then its manifest.

        Args:
            unit: Number of the row-block.
            blocks: The unit's rows of each array, by its name.

        Raises:
            ValueError: A unit that the store does not have or that is written already; a block that is not all rows of
                the unit, of another type, or holds the value for missing ones.
            ArtifactError: The disk gave back other bytes than were written.
        """
        if not 0 <= unit < self.spec.num_units:
            raise ValueError(f"unit {unit} of {self.path.name}, expected 0..{self.spec.num_units - 1}")
        if set(blocks) != {array.name for array in self.spec.arrays}:
            raise ValueError(f"unit {unit} has the arrays {sorted(blocks)}, expected all of {self.path.name}")
        for array in self.spec.arrays:
            self._check_block(array, unit, blocks[array.name])
        if self._manifest(unit) is not None:
            raise ValueError(f"unit {unit} of {self.path.name} is written already: units are written once")
        chunks: dict[str, dict[str, int | str]] = {}
        for array in self.spec.arrays:
            block = blocks[array.name]
            for view, key in enumerate(self.spec.chunk_keys(array, unit)):
                chunks[key] = self._write_chunk(key, array, block[:, view] if array.per_view else block)
        write_json(self._manifest_path(unit), {"unit": unit, "chunks": chunks})

    def finish(self) -> str:
        """Declare the store complete and return its digest. One process, after all have written their units.

        Raises:
            ArtifactError: A unit is missing.
        """
        hashes = {key: file_sha256(self.path / key) for key in metadata_keys(self.spec)}
        for unit in range(self.spec.num_units):
            chunks = self._manifest(unit)
            if chunks is None:
                raise ArtifactError(f"{self.path} lacks unit {unit} of {self.spec.num_units}: run the stage again")
            hashes |= {key: str(chunk["sha256"]) for key, chunk in chunks.items()}
        digest = store_digest(self._facts, hashes)
        remove_partials(self.path)
        done = _documents(self.spec, {"format": FORMAT, **self._facts, "digest": digest, "complete": True})
        _write_bytes(self.path / "zarr.json", done["zarr.json"])
        return digest

    def _check_block(self, array: ArraySpec, unit: int, block: Array) -> None:
        rows = self.spec.rows(unit)
        wanted = (rows.stop - rows.start, *array.shape[1:])
        if block.shape != wanted or block.dtype != np.dtype(array.dtype):
            raise ValueError(
                f"{array.name} of unit {unit} is {block.dtype} {block.shape}, expected {array.dtype} {wanted}: "
                "a unit is written whole"
            )
        if holds_missing(block, array.missing):
            raise ValueError(f"{array.name} of unit {unit} holds {array.missing}, the mark of missing entries")

    def _write_chunk(self, key: str, array: ArraySpec, rows: Array) -> dict[str, int | str]:
        chunk = np.full(self.spec.chunk_shape(array), array.missing or 0, dtype=np.dtype(array.dtype).newbyteorder("<"))
        chunk.reshape(self.spec.chunk_rows, *rows.shape[1:])[: len(rows)] = rows
        data = chunk.tobytes()
        checksum = google_crc32c.value(data)
        data += checksum.to_bytes(CRC_BYTES, "little")
        path = self.path / key
        _write_bytes(path, data)
        if path.read_bytes() != data:
            raise ArtifactError(f"{path} does not read back as it was written: the disk or file system is faulty")
        return {"bytes": len(data), "crc32c": checksum, "sha256": hashlib.sha256(data).hexdigest()}

    def _manifest_path(self, unit: int) -> Path:
        return self.path.parent / RECORD / "units" / f"{self.path.stem}-{unit:06d}.json"

    def _manifest(self, unit: int) -> dict[str, dict[str, int | str]] | None:
        """Chunks of a unit that is done: its manifest stands, and its files have their sizes."""
        path = self._manifest_path(unit)
        if not path.is_file():
            return None
        chunks: dict[str, dict[str, int | str]] = read_json(path)["chunks"]
        keys = [key for array in self.spec.arrays for key in self.spec.chunk_keys(array, unit)]
        if list(chunks) != keys or any(file_size(self.path / key) != chunks[key]["bytes"] for key in keys):
            return None
        return chunks

    def _refuse_other_store(self, documents: dict[str, bytes]) -> None:
        found = read_json(self.path / "zarr.json")["attributes"].get(ATTRIBUTES, {})
        facts = {name: value for name, value in found.items() if name not in NOT_FACTS}
        arrays = all(
            (self.path / key).is_file() and (self.path / key).read_bytes() == document
            for key, document in documents.items()
            if key != "zarr.json"
        )
        if _canonical(facts) != _canonical(self._facts) or not arrays:
            raise ArtifactError(f"{self.path} holds units of another store than this stage writes: remove it")


def store_digest(facts: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    """SHA-256 over what a store was made from and the SHA-256 of every file but the group's own, by key."""
    return hashlib.sha256(_canonical({"facts": dict(facts), "files": dict(hashes)})).hexdigest()


def metadata_keys(spec: StoreSpec) -> list[str]:
    """The arrays' metadata files below a store."""
    return [f"{array.name}/zarr.json" for array in spec.arrays]


def holds_missing(block: Array, missing: float | None) -> bool:
    """Whether a block holds the value that stands for entries never written; never if the type has no such value."""
    if missing is None:
        return False
    largest = block.max()  # NaN if there is one: no array of the same size is needed to find it
    return bool(np.isnan(largest) if np.isnan(missing) else largest == missing)


def file_size(path: Path) -> int | None:
    """Size of a file in bytes; None if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _documents(spec: StoreSpec, facts: Mapping[str, Any]) -> dict[str, bytes]:
    """The metadata files of a store, by their place below it, as zarr writes them."""
    files: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(files), attributes={ATTRIBUTES: dict(facts)})
    for array in spec.arrays:
        group.create_array(
            array.name,
            shape=array.shape,
            chunks=spec.chunk_shape(array),
            dtype=array.dtype,
            fill_value=array.missing or 0,
            filters=None,
            serializer=BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
        )
    return {key: value.to_bytes() for key, value in files.items()}


def _write_bytes(path: Path, data: bytes) -> None:
    write_atomic(path, lambda file: file.write(data))


def _canonical(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
