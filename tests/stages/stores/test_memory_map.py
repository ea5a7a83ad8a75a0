"""Many files as one array: any size of row, no file held open, nothing left when it is gone."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from stages.stores.memory_map import SideBySide

RNG = np.random.default_rng(4)


def files(folder: Path, num_files: int, rows: int, shape: tuple[int, ...], dtype: str) -> tuple[SideBySide, np.ndarray]:
    values = RNG.integers(0, 200, (num_files, rows, *shape)).astype(dtype)
    mapped = SideBySide(num_files, rows, shape, dtype)
    for place, part in enumerate(values):
        path = folder / f"{place}.bin"
        path.write_bytes(part.tobytes() + b"tail")
        assert mapped.lay(place, path, part.nbytes + 4) == part.nbytes + 4
    return mapped, values


@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [
        (3, (16,), "<u2"),
        (8, (577,), "<u2"),
        (1000, (), "<u2"),
        (5, (7, 9, 3), "u1"),
        (2048, (1,), "<u2"),
        (9, (25,), "<f4"),
    ],
)
def test_rows_of_every_size_are_where_the_pitch_says(
    tmp_path: Path, rows: int, shape: tuple[int, ...], dtype: str
) -> None:
    mapped, values = files(tmp_path, 5, rows, shape, dtype)
    found = mapped.rows()
    assert found.dtype == np.dtype(dtype)
    assert not found.flags.writeable
    assert np.array_equal(found.reshape(5, mapped.pitch, *shape)[:, :rows], values)


def test_the_bytes_of_a_file_are_its_rows_and_its_tail(tmp_path: Path) -> None:
    for rows in (2048, 7):  # rows that end with a page, and rows that end inside one
        mapped = SideBySide(3, rows, (2,), "<u2", tail=4)
        for place in range(3):
            path = tmp_path / f"{rows}-{place}.bin"
            path.write_bytes(bytes([place + 1]) * rows * 4 + b"tail")
            assert mapped.lay(place, path, rows * 4 + 4) == rows * 4 + 4
        for place in range(3):
            assert mapped.file(place).tobytes() == bytes([place + 1]) * rows * 4 + b"tail"
        found = mapped.rows()
        assert [found[place * mapped.pitch + rows - 1].tobytes() for place in range(3)] == [
            bytes([place + 1]) * 4 for place in range(3)
        ]


def test_a_file_of_another_size_or_none_is_told_and_not_mapped(tmp_path: Path) -> None:
    mapped, _ = files(tmp_path, 1, 4, (3,), "<u2")
    assert mapped.lay(0, tmp_path / "none.bin", 28) is None
    (tmp_path / "short.bin").write_bytes(b"12345")
    assert mapped.lay(0, tmp_path / "short.bin", 28) == 5
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="cannot be mapped"):
        mapped.lay(0, tmp_path / "folder", (tmp_path / "folder").stat().st_size)


def test_more_files_are_mapped_than_may_be_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        mapped, values = files(tmp_path, 300, 4, (3,), "<u2")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.array_equal(mapped.rows().reshape(300, mapped.pitch, 3)[:, :4], values)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is mapped")
def test_the_mapping_lives_as_long_as_an_array_of_it(tmp_path: Path) -> None:
    mapped, values = files(tmp_path, 3, 4, (3,), "<u2")
    row = mapped.rows()[mapped.pitch + 1]
    del mapped
    gc.collect()
    assert np.array_equal(row, values[1, 1])
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del row
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
