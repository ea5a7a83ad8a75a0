"""The metadata of a finished store, on disk or on S3, and the messages that name a damaged chunk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from stages.runtime.errors import ArtifactError
from stages.stores.layout import ATTRIBUTES, CRC_BYTES, FORMAT, NOT_FACTS, ArraySpec, StoreSpec

Read = Callable[[str], bytes]
SpecOf = Callable[[dict[str, Any]], StoreSpec]
_WHOLE = google_crc32c.value(bytes(CRC_BYTES))
"""CRC-32C of any data followed by their own CRC-32C, a constant. Zeros are the CRC-32C of empty data."""


@dataclass(frozen=True, slots=True)
class StoreHeader:
    """The metadata of a finished store."""

    location: Path | str
    """Folder, or address that starts with `s3://`."""
    facts: dict[str, Any]
    """Metadata: the store's attributes, without those of the format."""
    digest: str
    """SHA-256 over the attributes and the SHA-256 of every other file."""
    spec: StoreSpec

    @classmethod
    def read(cls, location: Path | str, read: Read, spec_of: SpecOf) -> StoreHeader:
        """Read the header of a store.

        Args:
            location: Folder or address, for errors.
            read: Reads a file of the store by its key.
            spec_of: Makes the layout from the metadata.

        Raises:
            ArtifactError: The store is missing or incomplete, or has another format or kind.
        """
        attributes = _parse(
            location, "zarr.json", read, lambda metadata: dict(metadata["attributes"].get(ATTRIBUTES, {}))
        )
        if attributes.get("format") != FORMAT or attributes.get("complete") is not True:
            raise ArtifactError(
                f"{location} has format {attributes.get('format')} and complete={attributes.get('complete')}, "
                f"expected format {FORMAT} and complete=True: run its stage again"
            )
        facts = {name: value for name, value in attributes.items() if name not in NOT_FACTS}
        try:
            return cls(location, facts, attributes["digest"], spec_of(facts))
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{location} has other attributes than its kind of store ({error})") from error

    def check_layout(self, array: ArraySpec, read: Read) -> None:
        """Check the fields of an array's Zarr metadata that reading raw files relies on.

        Raises:
            ArtifactError: The metadata are missing, damaged or different.
        """
        key = f"{array.name}/zarr.json"
        found = _parse(
            self.location,
            key,
            read,
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
                raise ArtifactError(
                    f"{self.location}/{key} has {name} {found[name]}, expected {value}: run its stage again"
                )

    def chunk_name(self, array: ArraySpec, key: str) -> str:
        """Name of a chunk for messages: array, number and file."""
        chunk = key.removeprefix(f"{array.name}/c/")
        return f"array {array.name}, chunk {chunk} of {PurePath(self.location).name} (file {self.location}/{key})"

    def size_damage(self, array: ArraySpec, key: str, found: int | None) -> str | None:
        """Description of a wrong file size, None if it is right. `found` is None if the file is missing."""
        wanted = self.spec.chunk_bytes(array)
        if found == wanted:
            return None
        state = "missing" if found is None else f"{found} bytes long"
        return f"{self.chunk_name(array, key)} is {state}, expected {wanted} bytes: run its stage again"

    def content_damage(self, array: ArraySpec, key: str, data: bytes | NDArray[np.uint8]) -> str | None:
        """Description of a wrong size or checksum of a chunk's file, None if both are right."""
        if what := self.size_damage(array, key, len(data)):
            return what
        if google_crc32c.value(data) != _WHOLE:
            return f"{self.chunk_name(array, key)} is damaged, its checksum differs: run its stage again"
        return None


def reader_of(folder: Path) -> Read:
    """Reader of the files of a store in a folder, by key."""
    return lambda key: (folder / key).read_bytes()


def _parse(location: Path | str, key: str, read: Read, pick: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Fields of a metadata file, selected by `pick`."""
    try:
        return pick(json.loads(read(key)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{location}/{key} is missing or damaged ({error}): run its stage again") from error
