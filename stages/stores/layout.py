"""Layout of a store: its arrays, the division of rows into units, and the names, sizes and metadata of its files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

Array = NDArray[Any]
FORMAT = 2
ATTRIBUTES = "dpar"
CRC_BYTES = 4
NOT_FACTS = frozenset({"format", "complete", "digest"})  # attributes of the format, which do not describe the content


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array of a store. Its first axis is the images."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Name of a little-endian type, e.g. `uint16`."""
    missing: float | None = None
    """Zarr's fill value, NaN or the largest value of the type, which no written entry has; None if there is none."""
    below: int | None = None
    """Upper bound (exclusive) of all values, checked by the writer so that readers need not; None if there is none."""
    per_view: bool = False
    """True if the second axis is the views, each with its own chunks."""

    def __post_init__(self) -> None:
        if self.missing is not None and not np.isnan(self.missing) and self.missing != np.iinfo(self.dtype).max:
            raise ValueError(
                f"{self.name} marks missing entries with {self.missing}, expected the largest {self.dtype}"
            )

    @property
    def num_views(self) -> int:
        """Number of chunks in a unit: one per view."""
        return self.shape[1] if self.per_view else 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row of one view."""
        return self.shape[2:] if self.per_view else self.shape[1:]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSpec:
    """The arrays of a store, and the number of rows in a unit."""

    arrays: tuple[ArraySpec, ...]
    chunk_rows: int

    @property
    def num_rows(self) -> int:
        """Images in the store."""
        return self.arrays[0].shape[0]

    @property
    def num_units(self) -> int:
        """Number of row-blocks in the store. The last one may be shorter."""
        return -(-self.num_rows // self.chunk_rows)

    def rows(self, unit: int) -> slice:
        """Rows of a unit."""
        return slice(unit * self.chunk_rows, min((unit + 1) * self.chunk_rows, self.num_rows))

    def count_rows(self, units: Iterable[int]) -> int:
        """Total number of rows in some units."""
        return sum(self.rows(unit).stop - self.rows(unit).start for unit in units)

    def chunk_shape(self, array: ArraySpec) -> tuple[int, ...]:
        """Shape of every chunk of an array. Zarr pads the last chunk to it."""
        return (self.chunk_rows, *((1,) if array.per_view else ()), *array.row_shape)

    def chunk_bytes(self, array: ArraySpec) -> int:
        """Size of every chunk file of an array, bytes."""
        return math.prod(self.chunk_shape(array)) * np.dtype(array.dtype).itemsize + CRC_BYTES

    def chunk_keys(self, array: ArraySpec, unit: int) -> list[str]:
        """Files of a unit's chunks below the store, one per view if the array has views."""
        zeros = "/0" * len(array.row_shape)
        if not array.per_view:
            return [f"{array.name}/c/{unit}{zeros}"]
        return [f"{array.name}/c/{unit}/{view}{zeros}" for view in range(array.num_views)]

    def keys(self, array: ArraySpec) -> Iterator[str]:
        """Files of all chunks of an array, unit by unit, and in each unit view by view."""
        return (key for unit in range(self.num_units) for key in self.chunk_keys(array, unit))


def value_damage(array: ArraySpec, block: Array) -> str | None:
    """Description of wrong values in an array's rows, as the end of a sentence; None if all are right."""
    if array.missing is not None and _holds(block, array.missing):
        return f"holds entries that were never written ({array.missing})"
    if block.dtype.kind == "f" and not np.isfinite(block).all():
        return "holds non-finite values"
    if array.below is not None and (largest := block.max(initial=0)) >= array.below:
        return f"holds {largest}, expected values below {array.below}"
    return None


def store_digest(facts: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    """SHA-256 over a store's metadata and the SHA-256 of every file except the group's metadata file."""
    return hashlib.sha256(_canonical({"facts": dict(facts), "files": dict(hashes)})).hexdigest()


def identity(spec: StoreSpec, facts: Mapping[str, Any]) -> str:
    """SHA-256 over a store's layout and metadata. It identifies the store that a unit belongs to."""
    arrays = [asdict(array) | {"missing": str(array.missing)} for array in spec.arrays]
    fields = {"format": FORMAT, "facts": dict(facts), "arrays": arrays, "chunk_rows": spec.chunk_rows}
    return hashlib.sha256(_canonical(fields)).hexdigest()


def metadata_keys(spec: StoreSpec) -> list[str]:
    """Keys of the arrays' metadata files."""
    return [f"{array.name}/zarr.json" for array in spec.arrays]


def metadata_files(spec: StoreSpec, facts: Mapping[str, Any], digest: str | None = None) -> dict[str, bytes]:
    """The metadata files of a store by key, as zarr writes them. With a digest, the store is marked as complete."""
    end = {"complete": False} if digest is None else {"digest": digest, "complete": True}
    files: dict[str, Buffer] = {}
    attributes = {ATTRIBUTES: {"format": FORMAT, **facts, **end}}
    group = zarr.create_group(MemoryStore(files), attributes=attributes)
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


def _holds(block: Array, missing: float) -> bool:
    largest = block.max()  # NaN if any value is NaN; needs no temporary array
    return bool(np.isnan(largest) if np.isnan(missing) else largest == missing)


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
