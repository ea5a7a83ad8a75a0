"""Reading a finished store (see `stages.stores.units`): its chunk files mapped into memory as one array of rows."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.artifact import read_json
from stages.errors import ArtifactError
from stages.stores.mapping import SideBySide
from stages.stores.units import ATTRIBUTES, FORMAT, NOT_FACTS, Array, ArraySpec, StoreSpec

Integers = NDArray[np.integer[Any]]
SpecOf = Callable[[dict[str, Any]], StoreSpec]


@dataclass(frozen=True, slots=True)
class StoreHeader:
    """What the metadata of a finished store say."""

    path: Path
    facts: dict[str, Any]
    digest: str
    spec: StoreSpec

    @classmethod
    def read(cls, path: Path, spec_of: SpecOf) -> StoreHeader:
        """Read the header of the store in the folder `path`; `spec_of` makes its layout from its facts.

        Raises:
            ArtifactError: No store, incomplete, or of another format or kind.
        """
        attributes = _parse(path / "zarr.json", lambda metadata: dict(metadata["attributes"].get(ATTRIBUTES, {})))
        if attributes.get("format") != FORMAT or attributes.get("complete") is not True:
            raise ArtifactError(
                f"{path} has format {attributes.get('format')} and complete={attributes.get('complete')}, "
                f"expected format {FORMAT} and complete=True: run its stage again"
            )
        facts = {name: value for name, value in attributes.items() if name not in NOT_FACTS}
        try:
            return cls(path, facts, attributes["digest"], spec_of(facts))
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path} has other attributes than its kind of store ({error})") from error

    def check_layout(self, array: ArraySpec) -> None:
        """Check the few facts of an array's Zarr metadata that reading raw files relies on.

        Raises:
            ArtifactError: Missing, damaged or different.
        """
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

    def chunk_name(self, array: ArraySpec, key: str) -> str:
        """A chunk as errors call it: by array, number and file."""
        chunk = key.removeprefix(f"{array.name}/c/")
        return f"array {array.name}, chunk {chunk} of {self.path.name} (file {self.path / key})"

    def size_damage(self, array: ArraySpec, key: str, found: int | None) -> str | None:
        """What the size of a chunk's file, None without a file, says is wrong with it."""
        wanted = self.spec.chunk_bytes(array)
        if found == wanted:
            return None
        state = "missing" if found is None else f"{found} bytes long"
        return f"{self.chunk_name(array, key)} is {state}, expected {wanted} bytes: run its stage again"


@dataclass(frozen=True, slots=True)
class MappedArray:
    """One array of a store: its chunks unit by unit, in a unit view by view, `pitch` rows apart in one array."""

    array: ArraySpec
    spec: StoreSpec
    rows: Array
    pitch: int

    def block(self, unit: int, view: int = 0) -> Array:
        """Rows of one unit, of one view where the array has views: read-only, straight from the file."""
        first = (unit * self.array.num_views + view) * self.pitch
        return self.rows[first : first + self.spec.count_rows([unit])]

    def blocks(self) -> Iterator[Array]:
        """Rows of one unit after the other, for an array without views."""
        return (self.block(unit) for unit in range(self.spec.num_units))

    def gather(self, rows: Integers, views: Integers) -> Array:
        """Copy rows in the order given, each of its view.

        Raises:
            IndexError: A row or view that the array does not have.
        """
        self._check_range("image", rows, self.array.shape[0])
        self._check_range("view", views, self.array.num_views)
        units, places = np.divmod(rows.astype(np.int64), self.spec.chunk_rows)
        return self.rows.take((units * self.array.num_views + views) * self.pitch + places, axis=0)

    def _check_range(self, what: str, numbers: Integers, count: int) -> None:
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= count):
            raise IndexError(f"{what}s {numbers.min()}..{numbers.max()} of {self.array.name}, expected 0..{count - 1}")


class BlockStore:
    """A finished store. Opening it checks that it is complete and that every chunk file has its exact size."""

    def __init__(self, path: Path, spec_of: SpecOf) -> None:
        """Open the store in the folder `path`; `spec_of` makes its layout from its facts.

        Raises:
            ArtifactError: No store, incomplete, of another layout, or a chunk file missing, cut or grown.
        """
        self.path = path
        self._header = StoreHeader.read(path, spec_of)
        self.facts, self.digest, self.spec = self._header.facts, self._header.digest, self._header.spec
        self.arrays = {array.name: self._map(array) for array in self.spec.arrays}

    def _map(self, array: ArraySpec) -> MappedArray:
        self._header.check_layout(array)
        spec = self.spec
        files = SideBySide(
            spec.num_units * array.num_views, spec.chunk_rows, array.row_shape, np.dtype(array.dtype).newbyteorder("<")
        )
        keys = (key for unit in range(spec.num_units) for key in spec.chunk_keys(array, unit))
        wanted = spec.chunk_bytes(array)
        for place, key in enumerate(keys):
            try:
                found = files.lay(place, self.path / key, wanted)
            except OSError as error:
                hint = ": raise vm.max_map_count or chunk_rows" if error.errno == errno.ENOMEM else ""
                raise ArtifactError(
                    f"{self._header.chunk_name(array, key)} cannot be read ({error.strerror}){hint}"
                ) from error
            if damage := self._header.size_damage(array, key, found):
                raise ArtifactError(damage)
        return MappedArray(array, spec, files.rows(), files.pitch)


def _parse(path: Path, pick: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What `pick` takes from a metadata file."""
    try:
        return pick(read_json(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}): run its stage again") from error
