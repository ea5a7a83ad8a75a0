"""Zarr stores that many processes write once: row-blocks as units of work, each chunk written whole by one process.

A unit is one block of rows of every array of the store. Chunks are neither compressed nor sharded, so that a chunk file
is the raw rows plus a CRC-32C, can be mapped into memory, and stays standard Zarr v3. A unit counts as done when its
manifest stands in `record/units` and its files have the bytes that the manifest records; that a file exists says
nothing, for Zarr shows missing chunks as fill values. The store counts as done when `complete` stands in its
attributes, which are written last.

What a killed attempt left may be damaged. Whatever does not match is written again, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from stages.runtime.artifact import RECORD, read_json, remove_partials, write_atomic, write_json
from stages.runtime.errors import ArtifactError
from stages.stores.layout import (
    ATTRIBUTES,
    CRC_BYTES,
    Array,
    ArraySpec,
    StoreSpec,
    identity,
    metadata_files,
    metadata_keys,
    store_digest,
    value_damage,
)

logger = logging.getLogger(__name__)
GROUP = "zarr.json"
_FIELDS = {"bytes", "crc32c", "sha256"}
Chunk = dict[str, int | str]
"""Size, CRC-32C and SHA-256 of a chunk file, as its unit's manifest records them."""


class _RefusedError(Exception):
    """Why a unit that has a manifest does not count as done."""


class UnitWriter:
    """Writes the units of one store, in any order, from any number of processes.

    Every process makes one with the same arguments; making it again continues what a killed attempt left. The
    manifests lie in `record/units` beside the store.
    """

    def __init__(self, path: Path, spec: StoreSpec, facts: Mapping[str, Any]) -> None:
        """Write the store's metadata where they are missing, damaged, or those of another store.

        Args:
            path: Folder of the store, e.g. output/tokens.zarr.
            spec: Its arrays.
            facts: Its metadata, as plain JSON: what it was made from. They become its attributes.
        """
        self.path, self.spec = path, spec
        self._facts = dict(facts)
        self._identity = identity(spec, facts)
        self._files = metadata_files(spec, facts)
        self._done: dict[int, dict[str, Chunk]] = {}
        self._write_metadata()

    def pending(self, rank: int = 0, size: int = 1) -> list[int]:
        """Units of one process of `size` that are not written yet: every `size`-th one, from `rank`.

        The files of units that a killed attempt wrote are read here, once, and compared with their manifests.
        """
        return [unit for unit in range(rank, self.spec.num_units, size) if self._written(unit) is None]

    def write(self, unit: int, **blocks: Array) -> None:
        """Write one unit: every chunk once and whole, read back, then its manifest.

        Args:
            unit: Number of the row-block.
            blocks: The unit's rows of each array, by its name.

        Raises:
            ValueError: A unit that the store does not have or that is written already; a block that is not all rows of
                the unit, of another type, or holds a value that the array must not hold.
            ArtifactError: The disk gave back other bytes than were written.
        """
        if not 0 <= unit < self.spec.num_units:
            raise ValueError(f"unit {unit} of {self.path.name}, expected 0..{self.spec.num_units - 1}")
        if set(blocks) != {array.name for array in self.spec.arrays}:
            raise ValueError(f"unit {unit} has the arrays {sorted(blocks)}, expected all of {self.path.name}")
        for array in self.spec.arrays:
            self._check_block(array, unit, blocks[array.name])
        if self._written(unit) is not None:
            raise ValueError(f"unit {unit} of {self.path.name} is written already: units are written once")
        chunks: dict[str, Chunk] = {}
        for array in self.spec.arrays:
            block = blocks[array.name]
            for view, key in enumerate(self.spec.chunk_keys(array, unit)):
                chunks[key] = self._write_chunk(key, array, block[:, view] if array.per_view else block)
        write_json(self._manifest_path(unit), {"unit": unit, "store": self._identity, "chunks": chunks})
        self._done[unit] = chunks

    def finish(self) -> str:
        """Declare the store complete and return its digest. One process, after all have written their units.

        Units of other processes count by their manifests and sizes: those processes wrote or read them.

        Raises:
            ArtifactError: A unit is missing.
        """
        hashes = {key: hashlib.sha256(self._files[key]).hexdigest() for key in metadata_keys(self.spec)}
        for unit in range(self.spec.num_units):
            chunks = self._written(unit, compare=False)
            if chunks is None:
                raise ArtifactError(f"{self.path} lacks unit {unit} of {self.spec.num_units}: run the stage again")
            hashes |= {key: str(chunk["sha256"]) for key, chunk in chunks.items()}
        digest = store_digest(self._facts, hashes)
        self._remove_others(hashes.keys() | {GROUP})
        self._write_metadata()
        _write_bytes(self.path / GROUP, metadata_files(self.spec, self._facts, digest)[GROUP])
        return digest

    def _check_block(self, array: ArraySpec, unit: int, block: Array) -> None:
        rows = self.spec.rows(unit)
        wanted = (rows.stop - rows.start, *array.shape[1:])
        if block.shape != wanted or block.dtype != np.dtype(array.dtype):
            raise ValueError(
                f"{array.name} of unit {unit} is {block.dtype} {block.shape}, expected {array.dtype} {wanted}: "
                "a unit is written whole"
            )
        if damage := value_damage(array, block):
            raise ValueError(f"{array.name} of unit {unit} {damage}")

    def _write_chunk(self, key: str, array: ArraySpec, rows: Array) -> Chunk:
        chunk = np.full(self.spec.chunk_shape(array), array.missing or 0, dtype=np.dtype(array.dtype).newbyteorder("<"))
        chunk.reshape(self.spec.chunk_rows, *rows.shape[1:])[: len(rows)] = rows
        values = chunk.tobytes()
        data = values + google_crc32c.value(values).to_bytes(CRC_BYTES, "little")
        path = self.path / key
        _write_bytes(path, data)
        if path.read_bytes() != data:
            raise ArtifactError(f"{path} does not read back as it was written: the disk or file system is faulty")
        return _describe(data)

    def _manifest_path(self, unit: int) -> Path:
        return self.path.parent / RECORD / "units" / f"{self.path.stem}-{unit:06d}.json"

    def _written(self, unit: int, *, compare: bool = True) -> dict[str, Chunk] | None:
        """Chunks of a unit that is done. The manifest of a unit that does not count as done is removed.

        Args:
            unit: Its number.
            compare: Read its files, once per process, and compare them with the manifest; else only their sizes.
        """
        if unit in self._done:
            return self._done[unit]
        try:
            chunks = self._manifest(unit)
            if compare:
                self._compare(chunks)
                self._done[unit] = chunks
        except FileNotFoundError:
            return None
        except _RefusedError as error:
            logger.warning("%s: unit %d of %s is made again", error, unit, self.path.name)
            self._manifest_path(unit).unlink(missing_ok=True)
            return None
        return chunks

    def _manifest(self, unit: int) -> dict[str, Chunk]:
        """Chunks of a unit by its manifest.

        Raises:
            FileNotFoundError: It has none.
            _RefusedError: It cannot be read, is of another store, or a file of the unit does not have its size.
        """
        path = self._manifest_path(unit)
        try:
            found = read_json(path)
            store, chunks = found["store"], {key: dict(chunk) for key, chunk in found["chunks"].items()}
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _RefusedError(f"{path} is damaged ({error})") from error
        if store != self._identity:
            raise _RefusedError(f"{path} is of another store")
        arrays = [(array, key) for array in self.spec.arrays for key in self.spec.chunk_keys(array, unit)]
        sizes = {key: self.spec.chunk_bytes(array) for array, key in arrays}
        fields = all(chunk.keys() == _FIELDS for chunk in chunks.values())
        if found.get("unit") != unit or not fields or {key: chunks[key]["bytes"] for key in chunks} != sizes:
            raise _RefusedError(f"{path} is damaged (its fields are not those of the unit)")
        for key, size in sizes.items():
            if _file_size(self.path / key) != size:
                raise _RefusedError(f"{self.path / key} is missing or not {size} bytes long")
        return chunks

    def _compare(self, chunks: Mapping[str, Chunk]) -> None:
        for key, chunk in chunks.items():
            if _describe(_read_bytes(self.path / key) or b"") != chunk:
                raise _RefusedError(f"{self.path / key} is not the file that its manifest records")

    def _write_metadata(self) -> None:
        """Write the metadata files that differ. Processes that start together write the same bytes: no barrier.

        The group's file comes last. It may also stand complete: then it was finished before, and stays.
        """
        for key in sorted(self._files, key=GROUP.__eq__):
            found = _read_bytes(self.path / key)
            if found == self._files[key] or (key == GROUP and found is not None and found == self._complete(found)):
                continue
            if found is not None:
                logger.warning("%s is damaged or of another store: written again", self.path / key)
            _write_bytes(self.path / key, self._files[key])

    def _complete(self, found: bytes) -> bytes | None:
        """The group's file of this store, complete, with the digest in `found`."""
        try:
            digest = str(json.loads(found)["attributes"][ATTRIBUTES]["digest"])
        except (ValueError, KeyError, TypeError):
            return None
        return metadata_files(self.spec, self._facts, digest)[GROUP]

    def _remove_others(self, keys: set[str]) -> None:
        """Remove the files that are no part of the store: of killed processes, and of another store before it."""
        remove_partials(self.path)
        for path in self.path.rglob("[!.]*"):
            if path.is_file() and path.relative_to(self.path).as_posix() not in keys:
                logger.warning("%s is no part of the store: removed", path)
                path.unlink()


def _describe(data: bytes) -> Chunk:
    """What a manifest records of a chunk file."""
    checksum = int.from_bytes(data[-CRC_BYTES:], "little")
    return {"bytes": len(data), "crc32c": checksum, "sha256": hashlib.sha256(data).hexdigest()}


def _file_size(path: Path) -> int | None:
    """Size of a file in bytes; None if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _read_bytes(path: Path) -> bytes | None:
    """Bytes of a file; None if it is missing or the disk cannot read it."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _write_bytes(path: Path, data: bytes) -> None:
    write_atomic(path, lambda file: file.write(data))
