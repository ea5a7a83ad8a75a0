"""Arrays of an `.npz` that may be damaged: they come back as they were written, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.runtime.artifact import read_arrays

ARRAYS = {
    "counts": np.arange(7, dtype=np.int64),
    "names": np.array(["a", "", "bcd"]),
    "sums": np.linspace(0, 1, 6).reshape(2, 3),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    np.savez(tmp_path / "part.npz", **ARRAYS)
    return tmp_path / "part.npz"


def same(found: dict[str, np.ndarray]) -> bool:
    return all(
        np.array_equal(found[name], values) and found[name].dtype == values.dtype for name, values in ARRAYS.items()
    )


def test_arrays_come_back(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = read_arrays(path)
    assert found is not None
    assert found.keys() == ARRAYS.keys()
    assert same(found)
    assert caplog.text == ""


def test_a_missing_file_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_arrays(tmp_path / "none.npz") is None
    assert caplog.text == ""


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04", b"\x93NUMPY\x01\x00", bytes(1000)])
def test_what_is_no_npz_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes) -> None:
    (tmp_path / "part.npz").write_bytes(data)
    assert read_arrays(tmp_path / "part.npz") is None
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{tmp_path}/part.npz is damaged (")
    assert "\n" not in warning


def test_objects_are_not_unpickled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "part.npz", objects=np.array([{}, None], dtype=object))
    assert read_arrays(tmp_path / "part.npz") is None
    assert "part.npz is damaged" in caplog.text


@pytest.mark.slow
def test_no_flipped_bit_gives_other_arrays(path: Path) -> None:
    """Bits beside the arrays' bytes may pass, such as those of the date that a zip has of each of its files."""
    whole = path.read_bytes()
    places = [whole.index(array.tobytes()) for array in ARRAYS.values()]
    values = {
        8 * place + bit for place, array in zip(places, ARRAYS.values(), strict=True) for bit in range(8 * array.nbytes)
    }
    for bit in values | set(range(0, 8 * len(whole), 7)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found = read_arrays(path)
        assert found is None or bit not in values
        assert found is None or found.keys() != ARRAYS.keys() or same(found), bit


def test_no_cut_file_is_read(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read_arrays(path) is None
