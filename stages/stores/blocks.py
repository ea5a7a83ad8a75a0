"""Reading a finished store (see `stages.stores.units`): its chunk files mapped into memory, damage found and named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from stages.artifact import read_json
from stages.errors import ArtifactError
from stages.stores.units import (
    ATTRIBUTES,
    CRC_BYTES,
    FORMAT,
    NOT_FACTS,
    Array,
    ArraySpec,
    StoreSpec,
    file_size,
    store_digest,
)

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class MappedArray:
    """One array of a store, by its chunks: unit by unit, and in a unit view by view."""

    spec: ArraySpec
    chunk_rows: int
    chunks: list[Array]
    """The rows of each chunk without padding and without the axis of views."""

    def block(self, unit: int, view: int = 0) -> Array:
        """Rows of one unit, of one view where the array has views: read-only, straight from the file."""
        return self.chunks[unit * self._num_views + view]

    def gather(self, rows: Integers, views: Integers) -> Array:
        """Copy rows in the order given, each of its view.

        Raises:
            IndexError: A row or view that the array does not have.
        """
        self._check_range("image", rows, self.spec.shape[0])
        self._check_range("view", views, self._num_views)
        units = rows // self.chunk_rows
        chunk_of = units * self._num_views + views
        order = np.argsort(chunk_of, kind="stable")
        out = np.empty((len(rows), *self.chunks[0].shape[1:]), dtype=self.spec.dtype)
        for places in np.split(order, np.flatnonzero(np.diff(chunk_of[order])) + 1):
            if len(places):
                chunk = self.chunks[chunk_of[places[0]]]
                out[places] = chunk[rows[places] - units[places[0]] * self.chunk_rows]
        return out

    @property
    def _num_views(self) -> int:
        return self.spec.shape[1] if self.spec.per_view else 1

    def _check_range(self, what: str, numbers: Integers, count: int) -> None:
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= count):
            raise IndexError(f"{what}s {numbers.min()}..{numbers.max()} of {self.spec.name}, expected 0..{count - 1}")


class BlockStore:
    """A finished store. Opening it checks that it is complete and that every chunk file has its exact size."""

    def __init__(self, path: Path, spec_of: Callable[[dict[str, Any]], StoreSpec]) -> None:
        """Open the store in the folder `path`; `spec_of` makes its layout from its facts.

        Raises:
            ArtifactError: No store, incomplete, of another layout, or a chunk file missing, cut or grown.
        """
        self.path = path
        attributes = _parse(path / "zarr.json", lambda metadata: dict(metadata["attributes"].get(ATTRIBUTES, {})))
        if attributes.get("format") != FORMAT or attributes.get("complete") is not True:
            raise ArtifactError(
                f"{path} has format {attributes.get('format')} and complete={attributes.get('complete')}, "
                f"expected format {FORMAT} and complete=True: run its stage again"
            )
        self.facts = {name: value for name, value in attributes.items() if name not in NOT_FACTS}
        try:
            self.digest: str = attributes["digest"]
            self.spec = spec_of(self.facts)
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path} has other attributes than its kind of store ({error})") from error
        self.arrays = {array.name: self._map(array) for array in self.spec.arrays}

    def verify(self) -> None:
        """Read every chunk and check its CRC-32C, and over all of them the store's digest.

        Raises:
            ArtifactError: The first damage found, by array, chunk and file; or whole chunks that are not the store's.
        """
        hashes: dict[str, str] = {}
        for array, key in self._chunk_files():
            data = (self.path / key).read_bytes()
            if google_crc32c.value(data[:-CRC_BYTES]) != int.from_bytes(data[-CRC_BYTES:], "little"):
                raise ArtifactError(
                    f"{self._chunk_name(array, key)} is damaged, its checksum differs: run its stage again"
                )
            hashes[key] = hashlib.sha256(data).hexdigest()
        if store_digest(self.facts, hashes) != self.digest:
            raise ArtifactError(
                f"{self.path} does not have the digest {self.digest}: chunks or facts were swapped; run its stage again"
            )

    def _chunk_files(self) -> Iterator[tuple[ArraySpec, str]]:
        for array in self.spec.arrays:
            for unit in range(self.spec.num_units):
                for key in self.spec.chunk_keys(array, unit):
                    yield array, key

    def _map(self, array: ArraySpec) -> MappedArray:
        self._check_layout(array)
        chunks: list[Array] = []
        shape = self.spec.chunk_shape(array)
        rows = (shape[0], *(shape[2:] if array.per_view else shape[1:]))
        for unit in range(self.spec.num_units):
            valid = self.spec.rows(unit)
            for key in self.spec.chunk_keys(array, unit):
                found, wanted = file_size(self.path / key), self.spec.chunk_bytes(array)
                if found != wanted:
                    state = "missing" if found is None else f"{found} bytes long"
                    raise ArtifactError(
                        f"{self._chunk_name(array, key)} is {state}, expected {wanted} bytes: run its stage again"
                    )
                data = np.memmap(self.path / key, np.dtype(array.dtype).newbyteorder("<"), mode="r", shape=rows)
                chunks.append(np.asarray(data[: valid.stop - valid.start]))
        return MappedArray(array, self.spec.chunk_rows, chunks)

    def _check_layout(self, array: ArraySpec) -> None:
        """The few facts of the Zarr metadata that reading raw files relies on."""
        path = self.path / array.name / "zarr.json"
        found = _parse(
            path,
            lambda metadata: {
                "shape": metadata["shape"],
                "data_type": metadata["data_type"],
                "chunk_shape": metadata["chunk_grid"]["configuration"]["chunk_shape"],
                "codecs": [codec["name"] for codec in metadata["codecs"]],
            },
        )
        wanted = {
            "shape": list(array.shape),
            "data_type": array.dtype,
            "chunk_shape": list(self.spec.chunk_shape(array)),
            "codecs": ["bytes", "crc32c"],
        }
        for name, value in wanted.items():
            if found[name] != value:
                raise ArtifactError(f"{path} has {name} {found[name]}, expected {value}: run its stage again")

    def _chunk_name(self, array: ArraySpec, key: str) -> str:
        chunk = key.removeprefix(f"{array.name}/c/")
        return f"array {array.name}, chunk {chunk} of {self.path.name} (file {self.path / key})"


def _parse(path: Path, pick: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What `pick` takes from a metadata file."""
    try:
        return pick(read_json(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}): run its stage again") from error
