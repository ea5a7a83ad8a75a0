"""Reader of a finished store (see `stages.stores.units`): its chunk files are mapped into memory as one array of rows.

A chunk is compared with its CRC-32C when this process first reads from it; later reads skip the check. Reading damaged
rows is therefore always an error, and a batch of rows from checked chunks costs no checksum.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from stages.runtime.arrays import Indices
from stages.runtime.errors import ArtifactError, InputError
from stages.stores.header import SpecOf, StoreHeader, reader_of
from stages.stores.layout import CRC_BYTES, Array, ArraySpec
from stages.stores.memory_map import SideBySide

S3 = "s3://"


class BlockArray(Protocol):
    """One array of a store, read in blocks or by rows."""

    def block(self, unit: int, view: int = 0) -> Array:
        """Rows of one unit, read-only; of one view if the array has views.

        Raises:
            ArtifactError: The chunk is damaged.
        """
        ...

    def gather(self, rows: Indices, views: Indices) -> Array:
        """Copy rows in the given order, each from its own view.

        Raises:
            IndexError: The array does not have a row or view.
            ArtifactError: A chunk of the rows is damaged.
            InputError: The store is on S3, where single rows cannot be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class MappedArray:
    """One array of a store. Chunks lie in `rows` unit by unit, in a unit view by view, `files.pitch` rows apart."""

    header: StoreHeader
    array: ArraySpec
    files: SideBySide
    rows: Array
    known_good: Bool[NDArray[np.bool_], " chunks"]
    """True for chunks whose checksum has been checked."""

    def block(self, unit: int, view: int = 0) -> Array:
        """See `BlockArray`. The rows are a view of the mapped file."""
        chunk = unit * self.array.num_views + view
        if not self.known_good[chunk]:
            self._check(chunk)
        first = chunk * self.files.pitch
        return self.rows[first : first + self.header.spec.count_rows([unit])]

    def gather(self, rows: Indices, views: Indices) -> Array:
        """See `BlockArray`."""
        self._check_range("image", rows, self.array.shape[0])
        self._check_range("view", views, self.array.num_views)
        units, places = np.divmod(rows.astype(np.int64), self.header.spec.chunk_rows)
        chunks = units * self.array.num_views + views
        known = self.known_good[chunks]
        if not known.all():
            for chunk in np.unique(chunks[~known]):
                self._check(int(chunk))
        return self.rows.take(chunks * self.files.pitch + places, axis=0)

    def _check(self, chunk: int) -> None:
        unit, view = divmod(chunk, self.array.num_views)
        key = self.header.spec.chunk_keys(self.array, unit)[view]
        try:
            data = self.files.file(chunk)
        except OSError as error:
            name = self.header.chunk_name(self.array, key)
            raise ArtifactError(f"{name} cannot be read ({error.strerror}): run its stage again") from error
        if damage := self.header.content_damage(self.array, key, data):
            raise ArtifactError(damage)
        self.known_good[chunk] = True

    def _check_range(self, what: str, numbers: Indices, count: int) -> None:
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= count):
            raise IndexError(f"{what}s {numbers.min()}..{numbers.max()} of {self.array.name}, expected 0..{count - 1}")


@dataclass(frozen=True, slots=True)
class BlockStore:
    """A finished store."""

    header: StoreHeader
    arrays: Mapping[str, BlockArray]

    def blocks(self, name: str) -> Iterator[Array]:
        """Rows of an array without views, unit by unit."""
        return (self.arrays[name].block(unit) for unit in range(self.header.spec.num_units))


def open_store(location: Path | str, spec_of: SpecOf) -> BlockStore:
    """Open a finished store.

    Args:
        location: Folder of the store, or an address `s3://bucket/key` (see `stages.stores.remote`).
        spec_of: Makes the layout from the store's attributes.

    Raises:
        ArtifactError: The store is missing, incomplete or of another layout, or a chunk file is missing or has
            another size.
        InputError: The address cannot be reached.
    """
    if isinstance(location, str) and location.startswith(S3):
        try:
            from stages.stores.remote import open_remote
        except ImportError as error:
            raise InputError(f"reading {location} needs obstore: pip install 'dpar[s3]'") from error
        header, remote = open_remote(location, spec_of)
        return BlockStore(header, remote)
    path = Path(location)
    read = reader_of(path)
    header = StoreHeader.read(path, read, spec_of)
    for array in header.spec.arrays:
        header.check_layout(array, read)
    return BlockStore(header, {array.name: _map(path, header, array) for array in header.spec.arrays})


def _map(path: Path, header: StoreHeader, array: ArraySpec) -> MappedArray:
    spec = header.spec
    dtype = np.dtype(array.dtype).newbyteorder("<")
    num_chunks = spec.num_units * array.num_views
    files = SideBySide(num_chunks, spec.chunk_rows, array.row_shape, dtype, tail=CRC_BYTES)
    for place, key in enumerate(spec.keys(array)):
        try:
            found = files.lay(place, path / key, spec.chunk_bytes(array))
        except OSError as error:
            hint = ": raise vm.max_map_count or chunk_rows" if error.errno == errno.ENOMEM else ""
            raise ArtifactError(f"{header.chunk_name(array, key)} cannot be read ({error.strerror}){hint}") from error
        if damage := header.size_damage(array, key, found):
            raise ArtifactError(damage)
    return MappedArray(header, array, files, files.rows(), np.zeros(num_chunks, np.bool_))
