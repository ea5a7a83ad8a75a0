"""The patch index: tokens that open a patch, one bit per token, in one Parquet row per view of an image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import IO, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray

from models.patch_tables import Bytes, unpack_bits
from stages.runtime.arrays import Indices, Starts
from stages.runtime.artifact import write_atomic
from stages.runtime.errors import ArtifactError
from stages.stores.tokens import TokenStore

FORMAT = "1"


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchFacts:
    """Metadata of a patch index: its sizes and its origin. Stored as text in the schema's metadata."""

    num_images: int
    num_views: int
    num_tokens: int
    entropies_digest: str
    """Digest of the entropy store; empty for static patches."""
    tokens_digest: str


def write_patches(
    path: Path, facts: PatchFacts, blocks: Iterable[Bytes], *, rule: Mapping[str, str], chunk_rows: int
) -> None:
    """Write an index, with one block in memory at a time.

    Args:
        path: File to write.
        facts: Sizes and origin.
        blocks: Patch starts as bits (rows, bytes), view by view, and in each view all images in order. Each block
            becomes a row group.
        rule: The rule behind the starts, for people who open the file.
        chunk_rows: Rows in a block; the last block of each view may have fewer.

    Raises:
        ValueError: The blocks do not cover all rows of all views.
    """
    text = {"format": FORMAT, **{name: str(value) for name, value in asdict(facts).items()}, **rule}
    schema = _schema(facts.num_tokens).with_metadata(text)
    write_atomic(path, lambda file: _write_blocks(file, schema, facts, blocks, chunk_rows))


class PatchIndex:
    """Patch starts of every view of every image, in memory: T / 8 bytes per view."""

    FILE: ClassVar[str] = "patches.parquet"
    """Name of the index in an artifact."""

    def __init__(self, path: Path, facts: PatchFacts, masks: UInt8[NDArray[np.uint8], "N A bytes"]) -> None:
        self.path, self.facts = path, facts
        self._masks = masks

    @classmethod
    def of(cls, inputs: Mapping[str, Path], tokens: TokenStore) -> PatchIndex:
        """Read the index of the `patch_index` artifact among `inputs`, made from `tokens`; see `open`."""
        return cls.open(inputs["patch_index"] / cls.FILE, tokens.digest)

    @classmethod
    def open(cls, path: Path, tokens_digest: str) -> PatchIndex:
        """Read the index in the file `path` (`patches.parquet`).

        Args:
            path: The file.
            tokens_digest: Digest of the token store that the index will be used with.

        Raises:
            ArtifactError: The file is missing, damaged or incomplete, or was made from other tokens.
        """
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                facts = _facts(path, file.schema_arrow)
                masks = _read_masks(path, file, facts)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ArtifactError(f"{path} is missing or damaged ({error}): run the patch_index stage again") from error
        if facts.tokens_digest != tokens_digest:
            raise ArtifactError(
                f"{path} was made from tokens {facts.tokens_digest[:12]}, expected {tokens_digest[:12]}: "
                "it belongs to another token store, run the patch_index stage again"
            )
        return cls(path, facts, masks)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all patch starts, in hex."""
        return hashlib.sha256(self._masks.data).hexdigest()

    def starts(self, images: Indices, views: Indices) -> Starts:
        """Patch starts of the given images, each in its own view."""
        return unpack_bits(self._masks[images, views], self.facts.num_tokens)

    def patch_counts(self) -> Int64[NDArray[np.int64], "N A"]:
        """Number of patches in every view of every image."""
        return np.bitwise_count(self._masks).sum(axis=-1, dtype=np.int64)

    def require_entropies(self, digest: str) -> None:
        """Check that the index was made from the entropy store of this digest.

        Raises:
            ArtifactError: The index was made from another store.
        """
        if self.facts.entropies_digest != digest:
            raise ArtifactError(
                f"{self.path} was made from entropies {self.facts.entropies_digest[:12]}, expected {digest[:12]}: "
                "it belongs to another entropy store, run the patch_index stage again"
            )


def _write_blocks(
    file: IO[bytes], schema: pa.Schema, facts: PatchFacts, blocks: Iterable[Bytes], chunk_rows: int
) -> None:
    written = 0
    with pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        column_encoding={"image_id": "DELTA_BINARY_PACKED", "n_patches": "DELTA_BINARY_PACKED"},
        write_page_checksum=True,
    ) as writer:
        for masks in blocks:
            view, first = divmod(written, facts.num_images)
            if masks.shape != (min(chunk_rows, facts.num_images - first), -(-facts.num_tokens // 8)):
                raise ValueError(f"patch starts from image {first} of view {view} have shape {masks.shape}")
            writer.write_table(_table(schema, view, first, masks), row_group_size=chunk_rows)
            written += len(masks)
    if written != facts.num_images * facts.num_views:
        raise ValueError(f"{written} rows were given, expected {facts.num_images} images x {facts.num_views} views")


def _schema(num_tokens: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("image_id", pa.uint32(), nullable=False),
            pa.field("view", pa.uint8(), nullable=False),
            pa.field("n_patches", pa.uint16(), nullable=False),
            pa.field("starts", pa.binary(-(-num_tokens // 8)), nullable=False),  # bit i % 8 of byte i // 8 is token i
        ]
    )


def _table(schema: pa.Schema, view: int, first: int, masks: Bytes) -> pa.Table:
    columns = [
        pa.array(np.arange(first, first + len(masks), dtype=np.uint32)),
        pa.array(np.full(len(masks), view, dtype=np.uint8)),
        pa.array(np.bitwise_count(masks).sum(axis=-1, dtype=np.uint16)),
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(masks.shape[1]), len(masks), [None, pa.py_buffer(masks.tobytes())]
        ),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _facts(path: Path, schema: pa.Schema) -> PatchFacts:
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    missing = [field.name for field in fields(PatchFacts) if field.name not in metadata]
    if missing or metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a patch index of format {FORMAT}: run the patch_index stage again")
    facts = PatchFacts(
        num_images=int(metadata["num_images"]),
        num_views=int(metadata["num_views"]),
        num_tokens=int(metadata["num_tokens"]),
        entropies_digest=metadata["entropies_digest"],
        tokens_digest=metadata["tokens_digest"],
    )
    if not schema.equals(_schema(facts.num_tokens)):
        raise ArtifactError(f"{path} has the columns {schema.names}, expected {_schema(facts.num_tokens).names}")
    return facts


def _read_masks(path: Path, file: pq.ParquetFile, facts: PatchFacts) -> UInt8[NDArray[np.uint8], "N A bytes"]:
    """Packed patch starts of all images and views. The order of the rows is checked."""
    num_rows = facts.num_images * facts.num_views
    if file.metadata.num_rows != num_rows:
        raise ArtifactError(f"{path} has {file.metadata.num_rows} rows, expected {num_rows}: run patch_index again")
    masks = np.empty((facts.num_images, facts.num_views, -(-facts.num_tokens // 8)), dtype=np.uint8)
    first = 0
    for group in range(file.num_row_groups):
        table = file.read_row_group(group).combine_chunks()
        views, images = divmod(np.arange(first, first + table.num_rows), facts.num_images)
        ordered = np.array_equal(table["image_id"], images) and np.array_equal(table["view"], views)
        starts = np.frombuffer(table["starts"].chunk(0).buffers()[1], np.uint8).reshape(table.num_rows, -1)
        if not ordered or not np.array_equal(np.bitwise_count(starts).sum(axis=-1), table["n_patches"]):
            raise ArtifactError(
                f"{path}, row group {group}: rows are out of order, or starts do not match n_patches: "
                "run the patch_index stage again"
            )
        masks[images, views] = starts
        first += table.num_rows
    return masks
