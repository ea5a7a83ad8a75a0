"""The store of VQ tokens: `tokens` (N, A, T) uint16 and `labels` (N,) uint16, N images in A views of T tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import UInt16
from numpy.typing import NDArray

from stages.runtime.arrays import Indices
from stages.stores.blocks import BlockStore, open_store
from stages.stores.layout import ArraySpec, StoreSpec
from stages.stores.units import UnitWriter

MISSING = 65535  # not a code: a codebook has at most 65,535 entries


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFacts:
    """Metadata of a token store: its sizes and its origin."""

    num_images: int
    num_train: int
    """Training images; they come first, the held-out ones after them."""
    num_classes: int
    num_views: int
    num_tokens: int
    grid: int
    """Tokens along one side of an image."""
    chunk_rows: int
    codebook_size: int
    image_size: int
    """Side of the images, pixels."""
    views: str
    """Kind of the views, as in the settings."""
    view_names: list[str]
    vq_sha256: str
    """SHA-256 of the tokenizer's weights file."""

    def spec(self) -> StoreSpec:
        """Layout of the store."""
        tokens = (self.num_images, self.num_views, self.num_tokens)
        return StoreSpec(
            arrays=(
                ArraySpec(
                    name="tokens",
                    shape=tokens,
                    dtype="uint16",
                    missing=MISSING,
                    below=self.codebook_size,
                    per_view=True,
                ),
                ArraySpec(
                    name="labels", shape=(self.num_images,), dtype="uint16", missing=MISSING, below=self.num_classes
                ),
            ),
            chunk_rows=self.chunk_rows,
        )


def token_writer(path: Path, facts: TokenFacts) -> UnitWriter:
    """Writer of the token store at `path`; each unit takes `tokens` (rows, A, T) and `labels` (rows,)."""
    return UnitWriter(path, facts.spec(), asdict(facts))


class TokenStore:
    """A finished token store, mapped into memory."""

    FILE: ClassVar[str] = "tokens.zarr"
    """Name of the store in an artifact."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._tokens = store.arrays["tokens"]
        self.location = store.header.location
        self.facts = TokenFacts(**store.header.facts)
        self.digest = store.header.digest
        self.labels: UInt16[NDArray[np.uint16], " N"] = np.concatenate(list(store.blocks("labels")))
        self.num_images, self.num_views = self.facts.num_images, self.facts.num_views
        self.num_tokens, self.grid = self.facts.num_tokens, self.facts.grid
        self.num_train, self.num_classes = self.facts.num_train, self.facts.num_classes
        self.codebook_size = self.facts.codebook_size

    @classmethod
    def of(cls, inputs: Mapping[str, Path]) -> TokenStore:
        """Open the store of the `tokenize` artifact among `inputs`; see `open`."""
        return cls.open(inputs["tokenize"] / cls.FILE)

    @classmethod
    def open(cls, location: Path | str) -> TokenStore:
        """Open the store in the folder tokens.zarr, or read-only at an address `s3://bucket/.../tokens.zarr`.

        Raises:
            ArtifactError: The store is missing, incomplete or damaged; see `open_store`.
        """
        return cls(open_store(location, lambda facts: TokenFacts(**facts).spec()))

    def __len__(self) -> int:
        return self.num_images

    def fetch(self, images: Indices, views: Indices) -> UInt16[NDArray[np.uint16], "n T"]:
        """Tokens of the given images, each in its view, as a copy.

        Raises:
            IndexError: The store does not have an image or view.
            ArtifactError: A chunk is damaged; found when it is first read.
        """
        tokens: NDArray[np.uint16] = self._tokens.gather(images, views)
        return tokens

    def read_block(self, unit: int, view: int) -> UInt16[NDArray[np.uint16], "rows T"]:
        """Tokens of one view of one unit: read-only, a view of the mapped file.

        Raises:
            ArtifactError: As `fetch`.
        """
        block: NDArray[np.uint16] = self._tokens.block(unit, view)
        return block

    def training_blocks(self) -> Iterator[UInt16[NDArray[np.uint16], "n T"]]:
        """Tokens of the first view of all training images, in order, one row-block at a time."""
        return self._first_view(0, self.num_train)

    def heldout_blocks(self) -> Iterator[UInt16[NDArray[np.uint16], "n T"]]:
        """Tokens of the first view of all held-out images, in order, one row-block at a time."""
        return self._first_view(self.num_train, self.num_images)

    def _first_view(self, first: int, last: int) -> Iterator[UInt16[NDArray[np.uint16], "n T"]]:
        for unit in range(self.num_units):
            rows = self.rows(unit)
            if rows.start < last and rows.stop > first:
                yield self.read_block(unit, 0)[max(first - rows.start, 0) : last - rows.start]

    def rows(self, unit: int) -> slice:
        """Images of a unit."""
        return self._store.header.spec.rows(unit)

    @property
    def num_units(self) -> int:
        """Row-blocks of the store."""
        return self._store.header.spec.num_units
