"""Pickles of torch.save are read as data: what torch writes is understood, and nothing is ever executed."""

from __future__ import annotations

import argparse
import io
import resource
import time
import zipfile
from collections import OrderedDict
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from weights_files import RAN, malicious, torch_bytes, with_pickle

from stages.runtime.errors import InputError
from stages.weights.pickled import PickleReader, Strided, Unread, UnreadableWeights, UnreadTensor
from stages.weights.state_dict import open_state_dict

# Until a model asks for these tensors; what lies beside weights is never made.
HARMLESS = {
    "view of a terabyte",
    "many names",
    "beside weights, tensor of a terabyte",
    "beside weights, bytearray of a terabyte",
}


@pytest.mark.parametrize("name", malicious(Path("/nowhere")))
def test_a_malicious_file_executes_nothing_and_takes_little_time_and_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(malicious(tmp_path)[name]())
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with (
        nullcontext() if name in HARMLESS else pytest.raises(InputError) as caught,
        open_state_dict(path, "tokenizer.weights", "model", "missing"),
    ):
        pass
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # kB
    assert not (tmp_path / RAN).exists()
    if caught is not None:
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < len(str(path)) + 500


def test_a_file_that_names_a_function_says_which_one_and_that_it_was_not_called(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    path.write_bytes(malicious(tmp_path)["beside weights, mkdir"]())
    with pytest.raises(InputError, match=r"Python objects \(posix.mkdir\), .*nothing in it was executed"):
        open_state_dict(path, None, "model", "missing").__enter__()


def tree(value: Any, *, legacy: bool) -> Any:
    data = torch_bytes(value, legacy=legacy)
    if not legacy:
        return PickleReader(io.BytesIO(_pickle_in(data))).read()
    stream = io.BytesIO(data)
    reader = PickleReader(stream)
    for _ in range(3):
        reader.read()
    return reader.read()


def _pickle_in(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_values_come_back_and_tensors_as_views_of_storages(legacy: bool) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    value = {
        "state": OrderedDict(a=base, b=base[1:3, ::2], c=torch.nn.Parameter(torch.zeros(2)), d=torch.zeros(0, 3)),
        "text": "ä",
        "numbers": [1, 300, 70000, -5, 2**40, 0.5],
        "flags": (True, False, None, ()),
        "args": argparse.Namespace(lr=1e-4, sizes=[1, 2]),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
    }
    found = tree(value, legacy=legacy)
    assert found["text"] == "ä"
    assert found["numbers"] == [1, 300, 70000, -5, 2**40, 0.5]
    assert found["flags"] == (True, False, None, ())
    assert found["args"] == Unread("argparse.Namespace")
    assert found["dtype"] == Unread("torch.bfloat16")
    state = found["state"]
    assert {name: (entry.shape, entry.stride, entry.offset) for name, entry in state.items()} == {
        "a": ((4, 6), (6, 1), 0),
        "b": ((2, 3), (6, 2), 6),
        "c": ((2,), (1,), 0),
        "d": ((0, 3), (3, 1), 0),
    }
    assert state["a"].storage == state["b"].storage
    assert state["b"].span == 6 + 6 + 4 + 1
    assert found["optimizer"]["state"] == {}, "keys that are no strings are never weights"


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.complex64, torch.bool]
)
def test_types_are_named(dtype: torch.dtype) -> None:
    entry = tree({"a": torch.zeros(2, dtype=dtype)}, legacy=False)["a"]
    assert isinstance(entry, Strided)
    assert f"torch.{entry.dtype}" == str(dtype)


def test_types_without_a_storage_of_their_own_are_named(tmp_path: Path) -> None:
    assert tree({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, legacy=False)["a"] == UnreadTensor(
        "a tensor of torch.float8_e4m3fn"
    )


def test_a_view_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    data = _pickle_in(torch_bytes({"a": torch.zeros(4)}))
    longer = data.replace(b"K\x04\x85", b"K\x05\x85")  # the shape (4,)
    assert longer != data
    with pytest.raises(UnreadableWeights, match=r"shape \(5,\) that ends at element 5 of a storage of 4"):
        PickleReader(io.BytesIO(longer)).read()
    (tmp_path / "longer.pt").write_bytes(with_pickle(longer))
    with pytest.raises(InputError, match=r"longer.pt has a tensor of shape \(5,\)"):
        open_state_dict(tmp_path / "longer.pt", None, "model", "missing").__enter__()


def test_random_bytes_never_raise_anything_else() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = _pickle_in(
        torch_bytes({"model": {"a": torch.zeros(2, 3), "b": torch.ones(4)}, "args": argparse.Namespace(x=1)})
    )
    for _ in range(1500):
        data = bytearray(whole)
        for place in torch.randint(len(data), (3,), generator=generator).tolist():
            data[place] = int(torch.randint(256, (1,), generator=generator))
        with suppress(UnreadableWeights):
            PickleReader(io.BytesIO(bytes(data))).read()
