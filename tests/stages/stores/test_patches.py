from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from models.patch_tables import pack_bits
from stages.runtime.errors import ArtifactError
from stages.stores.patches import PatchFacts, PatchIndex, write_patches

N, A, ROWS = 7, 2, 3
RNG = np.random.default_rng(2)


def facts(num_tokens: int) -> PatchFacts:
    return PatchFacts(
        num_images=N, num_views=A, num_tokens=num_tokens, entropies_digest="e" * 64, tokens_digest="t" * 64
    )


def write(path: Path, num_tokens: int = 16) -> np.ndarray:
    starts = RNG.random((N, A, num_tokens)) < 0.4
    starts[..., 0] = True
    blocks = [starts[first : first + ROWS, view] for view in range(A) for first in range(0, N, ROWS)]
    write_patches(path, facts(num_tokens), map(pack_bits, blocks), rule={"threshold": "7.8"}, chunk_rows=ROWS)
    return starts


@pytest.mark.parametrize("num_tokens", [16, 9, 25, 256])
def test_starts_come_back_whatever_the_number_of_tokens(tmp_path: Path, num_tokens: int) -> None:
    starts = write(tmp_path / "patches.parquet", num_tokens)
    index = PatchIndex.open(tmp_path / "patches.parquet", "t" * 64)
    images, views = RNG.integers(0, N, 30), RNG.integers(0, A, 30)
    assert np.array_equal(index.starts(images, views), starts[images, views])
    assert index.starts(images, views).dtype == np.bool_


def test_the_file_explains_itself(tmp_path: Path) -> None:
    starts = write(tmp_path / "patches.parquet")
    table = pq.read_table(tmp_path / "patches.parquet")
    assert table["view"].to_pylist() == [0] * N + [1] * N
    assert table["image_id"].to_pylist() == list(range(N)) * 2
    assert table["n_patches"].to_pylist() == starts.sum(-1).T.ravel().tolist()
    assert table.schema.metadata[b"threshold"] == b"7.8"
    assert table.schema.metadata[b"entropies_digest"] == b"e" * 64
    assert pq.ParquetFile(tmp_path / "patches.parquet").num_row_groups == A * 3


def test_the_same_starts_make_the_same_bytes(tmp_path: Path) -> None:
    starts = write(tmp_path / "one.parquet")
    blocks = [starts[first : first + ROWS, view] for view in range(A) for first in range(0, N, ROWS)]
    write_patches(
        tmp_path / "two.parquet", facts(16), map(pack_bits, blocks), rule={"threshold": "7.8"}, chunk_rows=ROWS
    )
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_an_index_of_other_tokens_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "patches.parquet")
    with pytest.raises(ArtifactError, match="was made from tokens tttttttttttt, expected ssssssssssss"):
        PatchIndex.open(tmp_path / "patches.parquet", "s" * 64)


def test_an_index_of_other_entropies_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "patches.parquet")
    index = PatchIndex.open(tmp_path / "patches.parquet", "t" * 64)
    index.require_entropies("e" * 64)
    with pytest.raises(ArtifactError, match="was made from entropies eeeeeeeeeeee, expected ffffffffffff"):
        index.require_entropies("f" * 64)


def test_the_digest_is_of_the_starts_alone(tmp_path: Path) -> None:
    starts = write(tmp_path / "one.parquet")
    for name, changed in (("same", starts), ("other", starts ^ (np.arange(16) == 9))):
        blocks = [pack_bits(changed[:, view]) for view in range(A)]
        write_patches(tmp_path / f"{name}.parquet", facts(16), blocks, rule={}, chunk_rows=N)
    one, same, other = (
        PatchIndex.open(tmp_path / f"{name}.parquet", "t" * 64).digest for name in ("one", "same", "other")
    )
    assert one == same != other


def test_blocks_that_are_not_all_rows_are_refused(tmp_path: Path) -> None:
    block = pack_bits(np.ones((ROWS, 16), dtype=bool))
    with pytest.raises(ValueError, match="3 rows were given, expected 7 images x 2 views"):
        write_patches(tmp_path / "patches.parquet", facts(16), [block], rule={}, chunk_rows=ROWS)
    with pytest.raises(ValueError, match="from image 0 of view 0 have shape"):
        write_patches(tmp_path / "patches.parquet", facts(16), [block[:2]], rule={}, chunk_rows=ROWS)
    assert not (tmp_path / "patches.parquet").exists()


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    path = tmp_path / "patches.parquet"
    with pytest.raises(ArtifactError, match=r"patches\.parquet is missing or damaged"):
        PatchIndex.open(path, "t" * 64)
    write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ArtifactError, match=r"patches\.parquet is missing or damaged"):
        PatchIndex.open(path, "t" * 64)
    place = pq.ParquetFile(path_with(path, whole)).metadata.row_group(2).column(3).data_page_offset
    damaged = bytearray(whole)
    damaged[place + 45] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ArtifactError, match=r"patches\.parquet"):
        PatchIndex.open(path, "t" * 64)


def path_with(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
