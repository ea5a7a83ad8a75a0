"""Reader of a finished store on S3. It reads whole blocks only: single rows would cost megabytes of transfer per row.

Endpoint, region and credentials come from the environment (`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID` ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from stages.runtime.errors import ArtifactError, InputError
from stages.stores.header import Read, SpecOf, StoreHeader
from stages.stores.layout import Array, ArraySpec

BLOCKS_KEPT = 4


class RemoteArray:
    """One array of a store on S3. The most recently read blocks are cached in memory."""

    def __init__(self, header: StoreHeader, array: ArraySpec, read: Read) -> None:
        self._header, self._array, self._read = header, array, read
        self._blocks = lru_cache(BLOCKS_KEPT)(self._fetch)

    def block(self, unit: int, view: int = 0) -> Array:
        """See `BlockArray`. The checksum is checked at every fetch."""
        return self._blocks(unit, view)

    def gather(self, rows: object, views: object) -> Array:
        """Always an error, see `BlockArray`.

        Raises:
            InputError: Single rows of a remote store cannot be read.
        """
        raise InputError(
            f"single rows of {self._header.location} cannot be read, only whole blocks: copy the store to a local disk"
        )

    def _fetch(self, unit: int, view: int) -> Array:
        spec, array = self._header.spec, self._array
        key = spec.chunk_keys(array, unit)[view]
        try:
            data = self._read(key)
        except OSError as error:
            raise ArtifactError(f"{self._header.chunk_name(array, key)} cannot be read ({error})") from error
        if damage := self._header.content_damage(array, key, data):
            raise ArtifactError(damage)
        dtype = np.dtype(array.dtype).newbyteorder("<")
        values = np.frombuffer(data, dtype, count=spec.chunk_rows * int(np.prod(array.row_shape)))
        return values.reshape(-1, *array.row_shape)[: spec.count_rows([unit])]


def open_remote(address: str, spec_of: SpecOf) -> tuple[StoreHeader, Mapping[str, RemoteArray]]:
    """Open the store at `s3://bucket/key`. One listing gives the sizes of all chunks.

    Raises:
        ArtifactError: The store is missing, incomplete or of another layout, or a chunk is missing or has another size.
        InputError: S3 cannot be reached.
    """
    try:
        store = S3Store.from_url(address.rstrip("/"))
        sizes = {entry["path"]: entry["size"] for entries in obstore.list(store) for entry in entries}
    except BaseError as error:
        raise InputError(f"{address} cannot be listed ({' '.join(str(error).split())})") from error

    def read(key: str) -> bytes:
        try:
            return obstore.get(store, key).bytes().to_bytes()
        except BaseError as error:
            raise OSError(" ".join(str(error).split())) from error

    header = StoreHeader.read(address, read, spec_of)
    for array in header.spec.arrays:
        header.check_layout(array, read)
        for key in header.spec.keys(array):
            if damage := header.size_damage(array, key, sizes.get(key)):
                raise ArtifactError(damage)
    return header, {array.name: RemoteArray(header, array, read) for array in header.spec.arrays}
