"""The store of samples: `images` (N, H, W, 3) uint8, `labels` (N,), `tokens` (N, T) and `patch_starts` (N, T) bool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, UInt16
from numpy.typing import NDArray

from stages.runtime.arrays import Indices, PixelBatch
from stages.stores.blocks import BlockStore, open_store
from stages.stores.layout import Array, ArraySpec, StoreSpec
from stages.stores.tokens import MISSING
from stages.stores.units import UnitWriter


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleFacts:
    """Metadata of a sample store."""

    num_samples: int
    num_classes: int
    num_tokens: int
    grid: int
    """Tokens along one side of an image."""
    codebook_size: int
    image_size: int
    """Side of the stored images, pixels."""
    chunk_rows: int
    """Samples made in one batch."""

    def spec(self) -> StoreSpec:
        """Layout of the store."""
        num, tokens = self.num_samples, (self.num_samples, self.num_tokens)
        return StoreSpec(
            arrays=(
                ArraySpec(name="images", shape=(num, self.image_size, self.image_size, 3), dtype="uint8"),
                ArraySpec(name="labels", shape=(num,), dtype="uint16", missing=MISSING, below=self.num_classes),
                ArraySpec(name="tokens", shape=tokens, dtype="uint16", missing=MISSING, below=self.codebook_size),
                ArraySpec(name="patch_starts", shape=tokens, dtype="bool"),
            ),
            chunk_rows=self.chunk_rows,
        )


def sample_writer(path: Path, facts: SampleFacts) -> UnitWriter:
    """Writer of the sample store at `path`; a unit takes its rows of `images`, `labels`, `tokens`, `patch_starts`."""
    return UnitWriter(path, facts.spec(), asdict(facts))


class SampleStore:
    """A finished sample store. Images stay on disk and are read in blocks; the other arrays are in memory."""

    FILE: ClassVar[str] = "samples.zarr"
    """Name of the store in an artifact."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self.location = store.header.location
        self.facts = SampleFacts(**store.header.facts)
        self.digest = store.header.digest
        self.labels: UInt16[NDArray[np.uint16], " N"] = self._whole("labels")
        self.tokens: UInt16[NDArray[np.uint16], "N T"] = self._whole("tokens")
        self.patch_starts: Bool[NDArray[np.bool_], "N T"] = self._whole("patch_starts")

    @classmethod
    def of(cls, inputs: Mapping[str, Path]) -> SampleStore:
        """Open the store of the `sample` artifact among `inputs`; see `open`."""
        return cls.open(inputs["sample"] / cls.FILE)

    @classmethod
    def open(cls, location: Path | str) -> SampleStore:
        """Open the store in the folder samples.zarr, or read-only at an address `s3://bucket/.../samples.zarr`.

        Raises:
            ArtifactError: The store is missing, incomplete or damaged; see `open_store`.
        """
        return cls(open_store(location, lambda facts: SampleFacts(**facts).spec()))

    def __len__(self) -> int:
        return self.facts.num_samples

    def images(self, rows: Indices) -> PixelBatch:
        """Images of the given rows, as a copy.

        Raises:
            IndexError: The store does not have a row.
            ArtifactError: A chunk is damaged; found when it is first read.
        """
        return self._store.arrays["images"].gather(rows, np.zeros_like(rows))

    def blocks(self) -> Iterator[PixelBatch]:
        """All images in order, one row-block at a time: read-only views of the mapped files.

        Raises:
            ArtifactError: A chunk is damaged.
        """
        yield from self._store.blocks("images")

    def _whole(self, name: str) -> Array:
        return np.concatenate(list(self._store.blocks(name)))
