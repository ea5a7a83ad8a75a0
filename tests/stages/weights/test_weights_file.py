"""Weights come back bit for bit from each format, and damage never becomes a tensor."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from weights_files import rezipped, torch_bytes

from stages.runtime.errors import InputError
from stages.weights.state_dict import load_state, open_state_dict

TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {str(dtype): (torch.randn(5, 7) * 100).to(dtype) for dtype in TYPES}
    return found | {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4)}


def read(path: Path) -> dict[str, Tensor]:
    with open_state_dict(path, None, "model", "missing") as state:
        return {name: entry.read().clone() for name, entry in state.tensors.items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.ckpt"])
@pytest.mark.parametrize("format", ["safetensors", "torch zip", "torch legacy"])
def test_the_format_is_that_of_the_contents(tmp_path: Path, tensors: dict[str, Tensor], name: str, format: str) -> None:
    content = save(tensors) if format == "safetensors" else torch_bytes(tensors, legacy=format == "torch legacy")
    (tmp_path / name).write_bytes(content)
    with open_state_dict(tmp_path / name, None, "model", "missing") as state:
        assert state.file.format == format
    assert same(read(tmp_path / name), tensors)


@pytest.mark.parametrize("legacy", [False, True])
def test_views_of_one_storage_come_back(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(60.0).reshape(10, 6)
    views = {
        "whole": base,
        "part": base[2:5, 1:4],
        "turned": base.T,
        "same": base[0, :1].expand(3, 2),
        "other": base + 1,
    }
    (tmp_path / "a.pt").write_bytes(torch_bytes(views, legacy=legacy))
    assert same(read(tmp_path / "a.pt"), views)


def test_parameters_and_files_written_on_a_gpu_are_plain_tensors(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(4.0))
    data = torch_bytes({"a": weight})
    (tmp_path / "a.pt").write_bytes(
        rezipped(
            data,
            lambda name, old: old.replace(b"\x03\x00\x00\x00cpu", b"\x06\x00\x00\x00cuda:0") if "pkl" in name else old,
        )
    )
    assert same(read(tmp_path / "a.pt"), {"a": weight.detach()})


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, tensors: dict[str, Tensor], legacy: bool) -> None:
    whole = torch_bytes(tensors, legacy=legacy)
    path = tmp_path / "a.pt"
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_a_tensor_is_found_by_the_checksum(tmp_path: Path) -> None:
    whole = bytearray(torch_bytes({"a": torch.arange(4000.0)}))
    whole[len(whole) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(whole)
    with pytest.raises(InputError, match=r"a.pt is damaged in its member 'data/0' \(Bad CRC-32 .*\): get the"):
        read(tmp_path / "a.pt")


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    whole = torch_bytes({"a": torch.zeros(4000)})
    (tmp_path / "a.pt").write_bytes(rezipped(whole, lambda _, data: data, zipfile.ZIP_DEFLATED))
    with pytest.raises(InputError, match=r"has compressed or encrypted members, which torch.save does not write"):
        read(tmp_path / "a.pt")


def test_members_that_are_missing_or_of_another_size_are_named(tmp_path: Path) -> None:
    whole, path = torch_bytes({"a": torch.zeros(4000)}), tmp_path / "a.pt"
    for changed, words in (
        (rezipped(whole, lambda name, data: None if name.endswith("data/0") else data), "lacks its member 'data/0'"),
        (
            rezipped(whole, lambda name, data: data[:-4] if name.endswith("data/0") else data),
            "15996 bytes for storage '0'",
        ),
        (
            rezipped(whole, lambda name, data: data * 2 if name.endswith("data/0") else data),
            "of 32,000 bytes, expected at",
        ),
        (rezipped(whole, lambda name, data: b"big" if name.endswith("byteorder") else data), "big-endian machine"),
        (_lying(whole, b"archive/data/0", 2**31), "of 2,147,483,648 bytes, expected at most"),
    ):
        path.write_bytes(changed)
        with pytest.raises(InputError, match=words):
            read(path)


def _lying(archive: bytes, name: bytes, size: int) -> bytes:
    """The directory of the archive says that a member has another size."""
    changed = bytearray(archive)
    entry = changed.rindex(b"PK\x01\x02", 0, changed.rindex(name))
    struct.pack_into("<LL", changed, entry + 20, size, size)
    return bytes(changed)


def test_a_storage_much_larger_than_the_model_is_not_read(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4, bias=False)
    (tmp_path / "a.pt").write_bytes(torch_bytes({"weight": torch.zeros(2**20)[:16].reshape(4, 4)}))
    with (
        open_state_dict(tmp_path / "a.pt", None, "model", "missing") as state,
        pytest.raises(InputError, match=r"4,194,304 bytes behind weight, expected at most .*: save copies"),
    ):
        load_state(model, state, "does not fit: {}")
