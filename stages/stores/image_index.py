"""The index of a data set's images in Parquet, one row per image. Training images come first, then held-out ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stages.images.image_file import archive_path, read_image
from stages.images.listing import Listing
from stages.runtime.artifact import read_json, write_atomic, write_json
from stages.runtime.errors import ArtifactError, StaleIndexError

INDEX_FILE = "images.parquet"
CLASSES_FILE = "classes.json"
DIGEST_BYTES = 16
FACTS = np.dtype([("bytes", "<i8"), ("width", "<i4"), ("height", "<i4"), ("digest", f"V{DIGEST_BYTES}")])
"""Metadata of an image file besides its name and class: size in bytes and pixels, BLAKE2b-128 of its bytes."""

_SCHEMA = pa.schema(
    [
        pa.field("relpath", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("label", pa.uint16(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("digest", pa.binary(DIGEST_BYTES), nullable=False),
    ]
)
_ROW_GROUP = 4096  # images that exist as Python objects at a time


def file_digest(data: bytes) -> bytes:
    """BLAKE2b-128 of a file's bytes, the image's identity in the index."""
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


def write_index(
    output: Path,
    *,
    images: Listing,
    facts: NDArray[np.void],
    order: NDArray[np.intp],
    num_train: int,
    source: str,
) -> None:
    """Write the index and the names of the classes below `output`.

    Args:
        output: Folder of the artifact.
        images: All images of the source.
        facts: Metadata of all images, dtype FACTS.
        order: Rows of the images to index, in the order of the index. The first `num_train` are for training.
        num_train: Number of training images. The images after them are held out.
        source: Kind of the source, as in the settings.
    """
    schema = _SCHEMA.with_metadata({"num_train": str(num_train), "source": source})

    def write(file: IO[bytes]) -> None:
        with pq.ParquetWriter(
            file, schema, compression="zstd", use_dictionary=False, write_page_checksum=True
        ) as writer:
            for first in range(0, len(order), _ROW_GROUP):
                rows = order[first : first + _ROW_GROUP]
                writer.write_table(pa.Table.from_arrays(_columns(images, facts, rows), schema=schema))

    write_json(output / CLASSES_FILE, images.classes)
    write_atomic(output / INDEX_FILE, write)


def _columns(images: Listing, facts: NDArray[np.void], rows: NDArray[np.intp]) -> list[pa.Array]:
    """Columns of _SCHEMA for a few images."""
    chosen = facts[rows]
    return [
        pa.array(images.relpaths[rows].tolist(), pa.string()),
        pa.array(images.offsets[rows]),
        pa.array(chosen["bytes"].copy()),
        pa.array(images.labels[rows]),
        pa.array(chosen["width"].copy()),
        pa.array(chosen["height"].copy()),
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(DIGEST_BYTES), len(rows), [None, pa.py_buffer(chosen["digest"].tobytes())]
        ),
    ]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageIndex:
    """The images of a data set. Images 0 .. num_train - 1 are for training, the others are held out."""

    relpaths: NDArray[np.str_]
    """Path of each image below the image root, see `stages.images.sources`; numpy's StringDType."""
    offsets: NDArray[np.int64]
    """Offset of each image in its tar, bytes; 0 for a separate file."""
    sizes: NDArray[np.int64]
    """Size of each image file, bytes."""
    digests: NDArray[np.uint8]
    """BLAKE2b-128 of each image file, (N, 16)."""
    labels: NDArray[np.uint16]
    classes: list[str]
    num_train: int
    source: str

    @classmethod
    def of(cls, inputs: Mapping[str, Path]) -> ImageIndex:
        """Read the index of the `dataset` artifact among `inputs`; see `open`."""
        return cls.open(inputs["dataset"])

    @classmethod
    def open(cls, artifact: Path) -> ImageIndex:
        """Read the index of a finished dataset artifact.

        Raises:
            ArtifactError: A file is missing or damaged.
        """
        path = artifact / INDEX_FILE
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                if not file.schema_arrow.equals(_SCHEMA):
                    raise ArtifactError(f"{path} has the columns {file.schema_arrow.names}, expected {_SCHEMA.names}")
                columns = _read_columns(file)
                metadata = {key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()}
            classes: list[str] = read_json(artifact / CLASSES_FILE)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ArtifactError(f"{path} cannot be read ({error}): run the dataset stage again") from error
        return cls(**columns, classes=classes, num_train=int(metadata["num_train"]), source=metadata["source"])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of all files, in hex."""
        return sha256(self.digests.data).hexdigest()

    @property
    def num_heldout(self) -> int:
        """Number of held-out images, which are never trained on."""
        return len(self) - self.num_train

    def read(self, root: Path, image: int) -> bytes:
        """The bytes of an image, checked against the index.

        Raises:
            StaleIndexError: The file is missing, or differs from the indexed file.
        """
        relpath, offset, size = self.relpaths[image], int(self.offsets[image]), int(self.sizes[image])
        try:
            data = read_image(root, relpath, offset, size)
        except OSError as error:
            lost = archive_path(root, relpath) if offset else root / relpath
            raise StaleIndexError(f"image {lost} cannot be read ({error.strerror}): restore it or run again") from error
        if len(data) != size or file_digest(data) != self.digests[image].tobytes():
            raise StaleIndexError(
                f"image {root / relpath} is not the file that the dataset stage indexed ({len(data)} bytes, indexed "
                f"with {size}): restore it, or run again to index the changed images"
            )
        return data


def num_images_of_parts(artifact: Path) -> tuple[int, int]:
    """Numbers of training and of held-out images of a finished dataset artifact.

    Raises:
        ArtifactError: The index is missing or damaged.
    """
    path = artifact / INDEX_FILE
    try:
        schema, count = pq.read_schema(path), pq.read_metadata(path).num_rows
        num_train = int(schema.metadata[b"num_train"])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): run the dataset stage again") from error
    return num_train, count - num_train


def _read_columns(file: pq.ParquetFile) -> dict[str, NDArray[Any]]:
    """Columns of an index, named as in `ImageIndex`, read by row group: a table would hold all data twice."""
    count = file.metadata.num_rows
    columns = {
        "relpaths": np.empty(count, np.dtypes.StringDType()),
        "offsets": np.empty(count, np.int64),
        "sizes": np.empty(count, np.int64),
        "digests": np.empty((count, DIGEST_BYTES), np.uint8),
        "labels": np.empty(count, np.uint16),
    }
    first = 0
    for batch in file.iter_batches(_ROW_GROUP, columns=["relpath", "offset", "bytes", "digest", "label"]):
        rows = slice(first, first + len(batch))
        columns["relpaths"][rows] = batch["relpath"].to_pylist()
        columns["offsets"][rows] = batch["offset"].to_numpy()
        columns["sizes"][rows] = batch["bytes"].to_numpy()
        columns["digests"][rows] = _fixed_bytes(batch["digest"])
        columns["labels"][rows] = batch["label"].to_numpy()
        first = rows.stop
    return columns


def _fixed_bytes(digests: pa.FixedSizeBinaryArray) -> NDArray[np.uint8]:
    """Bytes (n, DIGEST_BYTES) of a column of digests."""
    data = np.frombuffer(digests.buffers()[1], np.uint8).reshape(-1, DIGEST_BYTES)
    return data[digests.offset : digests.offset + len(digests)]
