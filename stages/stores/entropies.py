"""The store of next-token entropies: `entropy` (N, A, T) float32, nats, row for row beside a token store.

Entry i is H(x_i | x_<i). The first token has no prediction: its entry is the logarithm of the codebook size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from stages.runtime.arrays import Indices
from stages.stores.blocks import BlockStore, open_store
from stages.stores.layout import ArraySpec, StoreSpec
from stages.stores.units import UnitWriter


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyFacts:
    """Metadata of an entropy store: its sizes and its origin."""

    num_images: int
    num_train: int
    """Training images; they come first, the held-out ones after them."""
    num_views: int
    num_tokens: int
    grid: int
    """Tokens along one side of an image."""
    chunk_rows: int
    codebook_size: int
    tokens_digest: str
    """Digest of the token store that the entropies belong to."""
    model_sha256: str
    """SHA-256 of the entropy model's weights file."""
    precision: str
    """Precision of the forward pass."""

    def spec(self) -> StoreSpec:
        """Layout of the store."""
        shape = (self.num_images, self.num_views, self.num_tokens)
        array = ArraySpec(name="entropy", shape=shape, dtype="float32", missing=float("nan"), per_view=True)
        return StoreSpec(arrays=(array,), chunk_rows=self.chunk_rows)


def entropy_writer(path: Path, facts: EntropyFacts) -> UnitWriter:
    """Writer of the entropy store at `path`; each unit takes `entropy` (rows, A, T), all finite."""
    return UnitWriter(path, facts.spec(), asdict(facts))


class EntropyStore:
    """A finished entropy store, mapped into memory."""

    FILE: ClassVar[str] = "entropies.zarr"
    """Name of the store in an artifact."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._entropy = store.arrays["entropy"]
        self.location = store.header.location
        self.facts = EntropyFacts(**store.header.facts)
        self.digest = store.header.digest
        self.num_images, self.num_views = self.facts.num_images, self.facts.num_views
        self.num_tokens, self.grid = self.facts.num_tokens, self.facts.grid
        self.num_train, self.codebook_size = self.facts.num_train, self.facts.codebook_size
        self.tokens_digest = self.facts.tokens_digest

    @classmethod
    def of(cls, inputs: Mapping[str, Path]) -> EntropyStore:
        """Open the store of the `entropy_map` artifact among `inputs`; see `open`."""
        return cls.open(inputs["entropy_map"] / cls.FILE)

    @classmethod
    def open(cls, location: Path | str) -> EntropyStore:
        """Open the store in the folder entropies.zarr, or read-only at an address `s3://bucket/.../entropies.zarr`.

        Raises:
            ArtifactError: The store is missing, incomplete or damaged; see `open_store`.
        """
        return cls(open_store(location, lambda facts: EntropyFacts(**facts).spec()))

    def __len__(self) -> int:
        return self.num_images

    @property
    def num_units(self) -> int:
        """Row-blocks of the store."""
        return self._store.header.spec.num_units

    def rows(self, unit: int) -> slice:
        """Images of a unit."""
        return self._store.header.spec.rows(unit)

    def fetch(self, images: Indices, views: Indices) -> Float32[NDArray[np.float32], "n T"]:
        """Entropies in nats of the given images, each in its view, as a copy.

        Raises:
            IndexError: The store does not have an image or view.
            ArtifactError: A chunk is damaged; found when it is first read.
        """
        entropies: NDArray[np.float32] = self._entropy.gather(images, views)
        return entropies

    def read_block(self, unit: int, view: int) -> Float32[NDArray[np.float32], "rows T"]:
        """Entropies in nats of one view of one unit: read-only, a view of the mapped file.

        Raises:
            ArtifactError: As `fetch`.
        """
        block: NDArray[np.float32] = self._entropy.block(unit, view)
        return block
