"""Writer of Zarr stores that several processes write once. The unit of work is a row-block; a chunk has one writer.

A unit is one block of rows of every array in the store. Chunks are neither compressed nor sharded: a chunk file holds
the raw rows and a CRC-32C. It can be mapped into memory, and it is standard Zarr v3. A unit is done when its manifest
is in `record/units` and its files match the manifest. Reading a chunk proves nothing, because Zarr reads missing chunks
as fill values. The store is complete when its attributes, which are written last, contain `complete`.

Files of a killed run may be damaged. A file that does not match its manifest is written again, with a warning.
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
    """A unit has a manifest and is not done. The message is the reason."""


class UnitWriter:
    """Writes the units of one store, in any order, from any number of processes.

    Every process creates a writer with the same arguments. A new writer continues the work of a killed run. The
    manifests are in `record/units` beside the store.
    """

    def __init__(self, path: Path, spec: StoreSpec, facts: Mapping[str, Any]) -> None:
        """Write the store's metadata files that are missing, damaged, or belong to another store.

        Args:
            path: Folder of the store, e.g. output/tokens.zarr.
            spec: Layout of the store.
            facts: Metadata of the store as plain JSON, saved as its attributes.
        """
        self.path, self.spec = path, spec
        self._facts = dict(facts)
        self._identity = identity(spec, facts)
        self._files = metadata_files(spec, facts)
        self._done: dict[int, dict[str, Chunk]] = {}
        self._write_metadata()

    def pending(self, rank: int = 0, size: int = 1) -> list[int]:
        """Units of process `rank` that are not written yet, among every `size`-th unit starting at `rank`.

        Files of units that a killed run wrote are read here, once, and compared with their manifests.
        """
        return [unit for unit in range(rank, self.spec.num_units, size) if self._written(unit) is None]

    def write(self, unit: int, **blocks: Array) -> None:
        """Write one unit: every chunk once and whole, read back, then its manifest.

        Args:
            unit: Number of the row-block.
            blocks: The unit's rows of each array, by its name.

        Raises:
            ValueError: The unit does not exist or is already written, or a block has another shape or type than the
                unit's rows, or holds a value that the array must not hold.
            ArtifactError: The disk returns other bytes than were written.
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
        """Mark the store as complete and return its digest. One process calls this after all units are written.

        For units of other processes, only manifests and file sizes are checked: those processes checked the content.

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
        """Chunks of a unit if it is done, else None. The manifest of a unit that is not done is removed.

        Args:
            unit: Number of the row-block.
            compare: Read the files, once per process, and compare them with the manifest. Otherwise compare sizes only.
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
        """Chunks in a unit's manifest.

        Raises:
            FileNotFoundError: The unit has no manifest.
            _RefusedError: The manifest is damaged or belongs to another store, or a file of the unit has another size.
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
        """Write the metadata files that differ. Concurrent processes write the same bytes, so no barrier is needed.

        The group's file comes last. If it is already marked as complete, the store is finished and the file is kept.
        """
        for key in sorted(self._files, key=GROUP.__eq__):
            found = _read_bytes(self.path / key)
            if found == self._files[key] or (key == GROUP and found is not None and found == self._complete(found)):
                continue
            if found is not None:
                logger.warning("%s is damaged or of another store: written again", self.path / key)
            _write_bytes(self.path / key, self._files[key])

    def _complete(self, found: bytes) -> bytes | None:
        """The group's metadata file of the complete store, with the digest in `found`; None if there is no digest."""
        try:
            digest = str(json.loads(found)["attributes"][ATTRIBUTES]["digest"])
        except (ValueError, KeyError, TypeError):
            return None
        return metadata_files(self.spec, self._facts, digest)[GROUP]

    def _remove_others(self, keys: set[str]) -> None:
        """Remove files that are not part of the store: those of killed processes, and of an earlier store."""
        remove_partials(self.path)
        for path in self.path.rglob("[!.]*"):
            if path.is_file() and path.relative_to(self.path).as_posix() not in keys:
                logger.warning("%s is not part of the store: removed", path)
                path.unlink()


def _describe(data: bytes) -> Chunk:
    """Manifest entry of a chunk file."""
    checksum = int.from_bytes(data[-CRC_BYTES:], "little")
    return {"bytes": len(data), "crc32c": checksum, "sha256": hashlib.sha256(data).hexdigest()}


def _file_size(path: Path) -> int | None:
    """Size of a file in bytes; None if it does not exist."""
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
