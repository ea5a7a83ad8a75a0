"""The index of a data set's images: one row an image, in Parquet. Training images come first, then held-out ones."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stages.artifact import read_json, write_atomic, write_json
from stages.errors import ArtifactError, InputError

INDEX_FILE = "images.parquet"
CLASSES_FILE = "classes.json"
DIGEST_BYTES = 16
FACTS = np.dtype([("bytes", "<i8"), ("width", "<i4"), ("height", "<i4"), ("digest", f"V{DIGEST_BYTES}")])
"""What is known of an image file besides its name and class: size in bytes and pixels, BLAKE2b-128 of its bytes."""

_SCHEMA = pa.schema(
    [
        pa.field("relpath", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("label", pa.uint16(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("digest", pa.binary(DIGEST_BYTES), nullable=False),
    ]
)
_ROW_GROUP = 65536


def file_digest(data: bytes) -> bytes:
    """BLAKE2b-128 of a file's bytes: what the index knows an image by."""
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


def write_index(
    output: Path,
    *,
    relpaths: list[str],
    labels: NDArray[np.uint16],
    facts: NDArray[np.void],
    classes: list[str],
    num_train: int,
    source: str,
) -> None:
    """Write the index and the names of the classes below `output`.

    Args:
        output: Folder of the artifact.
        relpaths: Of each image, below the image root; the first `num_train` are for training.
        labels: Place of each image's class in `classes`.
        facts: Array of dtype FACTS.
        classes: Names of the classes.
        num_train: Training images; those after them are held out.
        source: Where the images came from, as in the settings.
    """
    columns = [
        pa.array(relpaths, pa.string()),
        pa.array(facts["bytes"].copy()),
        pa.array(labels),
        pa.array(facts["width"].copy()),
        pa.array(facts["height"].copy()),
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(DIGEST_BYTES), len(facts), [None, pa.py_buffer(facts["digest"].tobytes())]
        ),
    ]
    schema = _SCHEMA.with_metadata({"num_train": str(num_train), "source": source})
    table = pa.Table.from_arrays(columns, schema=schema)
    write_json(output / CLASSES_FILE, classes)
    write_atomic(
        output / INDEX_FILE,
        lambda file: pq.write_table(
            table,
            file,
            row_group_size=_ROW_GROUP,
            compression="zstd",
            use_dictionary=False,
            write_page_checksum=True,
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageIndex:
    """The images of a data set, by number: 0 .. num_train - 1 are for training, the others held out."""

    relpaths: NDArray[np.str_]
    """Of each file below the image root; of numpy's StringDType, which takes a third of a list of str."""
    sizes: NDArray[np.int64]
    """Bytes of each file."""
    digests: NDArray[np.uint8]
    """BLAKE2b-128 of each file, (N, 16)."""
    labels: NDArray[np.uint16]
    classes: list[str]
    num_train: int
    source: str

    @classmethod
    def open(cls, artifact: Path) -> ImageIndex:
        """Read the index of a finished dataset artifact.

        Raises:
            ArtifactError: A file is missing or damaged.
        """
        path = artifact / INDEX_FILE
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            classes: list[str] = read_json(artifact / CLASSES_FILE)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ArtifactError(f"{path} cannot be read ({error}): run the dataset stage again") from error
        if not table.schema.equals(_SCHEMA):
            raise ArtifactError(f"{path} has the columns {table.schema.names}, expected {_SCHEMA.names}")
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        digests = table["digest"].combine_chunks().buffers()[1]
        return cls(
            relpaths=np.array(table["relpath"].to_pylist(), dtype=np.dtypes.StringDType()),
            sizes=table["bytes"].to_numpy(),
            digests=np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES),
            labels=table["label"].to_numpy(),
            classes=classes,
            num_train=int(metadata["num_train"]),
            source=metadata["source"],
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of all files, in hex."""
        return sha256(self.digests.data).hexdigest()

    @property
    def num_heldout(self) -> int:
        """Images that are never trained on."""
        return len(self) - self.num_train

    def read(self, root: Path, image: int) -> bytes:
        """The bytes of an image's file, checked against the index.

        Raises:
            InputError: The file is gone, or is not the one that was indexed.
        """
        path = root / self.relpaths[image]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"image {path} cannot be read ({error.strerror}): restore it or run again") from error
        if len(data) != self.sizes[image] or file_digest(data) != self.digests[image].tobytes():
            raise InputError(
                f"image {path} is not the file that the dataset stage indexed ({len(data)} bytes, indexed with "
                f"{self.sizes[image]}): restore it, or run again to index the changed images"
            )
        return data
