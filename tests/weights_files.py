"""Files that are given as weights and are none: other kinds, damaged ones, and such as would run code or fill memory.

Each function writes one file. The name of the function says what it is.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

RAN = "ran"  # the folder that a file's code would make, beside the file


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def rezipped(data: bytes, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive with changed members; None removes one."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w", compression) as new:
        for info in old.infolist():
            content = change(info.filename, old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    return made.getvalue()


def torch_bytes(value: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def with_pickle(pickled: bytes) -> bytes:
    """A file of torch.save with another pickle."""
    whole = torch_bytes({"a": torch.zeros(4)})
    return rezipped(whole, lambda name, data: pickled if name.endswith("data.pkl") else data)


def safetensors_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: str, shape: list[int], first: int, last: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def tarred(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("vq.pt")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def torch_script() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and old files are about
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(4))
    return buffer.getvalue()


def optimiser_state() -> bytes:
    """As AdamW has it; torch.optim itself takes seconds to import."""
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    return torch_bytes({"state": {0: moments}, "param_groups": [{"lr": 1e-3, "params": [0]}]})


WHOLE = torch_bytes({"model": {"weight": torch.arange(1000.0)}})
OTHER_KINDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "git lfs": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 287920306\n",
        "a Git LFS pointer, .*: run `git lfs pull`",
    ),
    "git annex": (lambda: b"/annex/objects/SHA256E-s287920306--4d7a.pt\n", "a git-annex pointer.*`git annex get`"),
    "dvc": (lambda: b"outs:\n- md5: a304afb96060aad90176268345e10355\n  path: vq.pt\n", "a DVC pointer.*`dvc pull`"),
    "html": (lambda: b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "an HTML page, .* login"),
    "html in UTF-16": (lambda: "<html>".encode("utf-16"), "a text file in UTF-16"),
    "json with a mark": (lambda: b'\xef\xbb\xbf{"error": 1}', "a JSON file of 15 bytes"),
    "pickle of another protocol": (lambda: pickle.dumps({"a": [1, 2]}, protocol=4), "Python pickle with MEMOIZE"),
    "html with a mark": (lambda: b"\xef\xbb\xbf<HTML lang='en'>", "an HTML page"),
    "xml": (lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document.* again"),
    "json": (lambda: b'{"error": "Entry not found"}', "a JSON file of 28 bytes"),
    "index of shards": (
        lambda: json.dumps({"weight_map": {f"w{n}": f"m-{n % 3}.safetensors" for n in range(9)}}).encode(),
        r"the index of a checkpoint in 3 files \(m-0.safetensors, m-1.safetensors, m-2.safetensors\).*one safetensors",
    ),
    "text": (lambda: b"see the other branch\nplease", "a text file that begins with 'see the other branch'"),
    "empty": (lambda: b"", r"empty \(0 bytes\).*again"),
    "zeros": (lambda: bytes(5000), "begins with 4096 zero bytes, an unfinished download"),
    "gzip": (lambda: gzip.compress(WHOLE), "a gzip archive.*gunzip"),
    "tar": (lambda: tarred(WHOLE), "a tar archive.*tar -xf"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(40), "a 7z archive.*7z x"),
    "xz": (lambda: b"\xfd7zXZ\x00\x00\x04" + bytes(40), "an xz archive"),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd" + bytes(40), "a zstd archive"),
    "zip of weights": (lambda: zipped(**{"vq_ds16_c2i.pt": WHOLE}), "a zip archive with vq_ds16_c2i.pt.*unpack it"),
    "zip without members": (zipped, "an empty zip archive"),
    "numpy archive": (npz, r"a NumPy archive \(.npz\)"),
    "numpy array": (lambda: b"\x93NUMPY\x01\x00" + bytes(80), "a NumPy array"),
    "TorchScript": (torch_script, "a TorchScript archive, .*torch.jit.load"),
    "Keras": (lambda: zipped(**{"config.json": b"{}", "model.weights.h5": b"x"}), "a Keras model"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(80), "an HDF5 file, as Keras and TensorFlow"),
    "SavedModel": (lambda: b"\x08\x01\x12\xa0\x04" + bytes(80), "a SavedModel of TensorFlow"),
    "TensorFlow Lite": (lambda: b"\x1c\x00\x00\x00TFL3" + bytes(80), "a TensorFlow Lite model"),
    "ONNX": (lambda: b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:" + bytes(80), "an ONNX model"),
    "GGUF": (lambda: b"GGUF\x03\x00\x00\x00" + bytes(80), "a GGUF file"),
    "sqlite": (lambda: b"SQLite format 3\x00" + bytes(80), "an SQLite database"),
    "image": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(80), "a PNG image"),
    "noise": (lambda: bytes(range(160, 250)) * 20, "of no known format"),
    "cut off zip": (lambda: WHOLE[:3000], "a zip archive that is damaged or cut off after 3,000 bytes"),
    "only the start of a zip": (lambda: b"PK\x03\x04broken", "a zip archive that is damaged or cut off"),
    "cut off safetensors": (
        lambda: save({"a": torch.zeros(100)})[:-30],
        "a safetensors file that is cut off, or longer",
    ),
    "safetensors and more": (lambda: save({"a": torch.zeros(100)}) + b"x", "cut off, or longer than its header says"),
    "cut off legacy": (lambda: torch_bytes({"a": torch.zeros(9)}, legacy=True)[:-9], "is cut off: it has .* bytes"),
    "legacy without its end": (lambda: torch_bytes({"a": torch.zeros(9)}, legacy=True)[:60], "damaged or cut off"),
    "pickle": (lambda: pickle.dumps({"a": [1, 2]}, protocol=2), "a Python pickle, expected weights"),
    "optimiser": (optimiser_state, "the state of an optimiser and no weights"),
    "a whole model": (lambda: torch_bytes(torch.nn.Linear(2, 2)), r"Python objects \(torch.nn.modules.linear.Linear\)"),
    "a tensor": (lambda: torch_bytes(torch.zeros(2)), "holds one tensor, expected a state dict"),
    "a list": (lambda: torch_bytes([torch.zeros(2)]), "holds a list, expected a state dict"),
    "a number": (lambda: torch_bytes(3), "holds a number, expected a state dict"),
    "nothing": (lambda: torch_bytes({}), "holds no weights, expected model or module or state_dict, it has nothing"),
    "a quantised tensor": (
        lambda: torch_bytes({"model": {"a": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)}}),
        "a is a quantised tensor, expected a tensor",
    ),
    "a sparse tensor": (
        lambda: torch_bytes({"model": {"a": torch.eye(2).to_sparse()}}),
        "a is a sparse tensor, expected a tensor",
    ),
    "an epoch among tensors": (
        lambda: torch_bytes({"model": {"a": torch.zeros(2), "epoch": 3}}),
        "epoch is a number, expected a tensor",
    ),
}
"""Bytes of a file, and what must be said of it."""


def _opcodes(*lines: bytes) -> bytes:
    return b"\x80\x02" + b"".join(lines) + b"."


def _deep(levels: int) -> bytes:
    return _opcodes(b"]" * levels, b"a" * (levels - 1))


def _keys_that_take_forever() -> bytes:
    """A dictionary whose key is a tuple of two tuples of two tuples …: its hash takes 2 ** 60 steps."""
    pairs = b"".join(b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60))
    return _opcodes(b"}", b")q\x00", pairs, b"K\x01s")


def malicious(folder: Path) -> dict[str, Callable[[], bytes]]:
    """Files that would make `folder`/ran, fill memory, or take forever, by name."""
    goal = str(folder / RAN)
    calls: dict[str, Any] = {
        "mkdir": Call(os.mkdir, goal),
        "system": Call(os.system, f"mkdir {goal}"),
        "eval": Call(eval, f"__import__('os').mkdir({goal!r})"),
        "exec": Call(exec, f"import os; os.mkdir({goal!r})"),
        "getattr": Call(getattr, goal, "upper"),
        "torch.load": Call(torch.load, goal),
        "open": Call(open, goal, "w"),
        "bytearray of a terabyte": Call(bytearray, 2**40),
        "tensor of a terabyte": Call(torch.Tensor, 2**20, 2**20),
    }
    found: dict[str, Callable[[], bytes]] = dict(BOMBS)
    for name, call in calls.items():
        beside = {"model": {"a": torch.zeros(1)}, "args": [call]}
        found[f"zip, {name}"] = partial(torch_bytes, {"model": call})
        found[f"beside weights, {name}"] = partial(torch_bytes, beside)
        found[f"legacy, {name}"] = partial(torch_bytes, {"model": call}, legacy=True)
        found[f"pickle, {name}"] = partial(pickle.dumps, call, protocol=2)
    text = b"X" + struct.pack("<I", len(goal)) + goal.encode()
    found["pickle of its own"] = partial(with_pickle, _opcodes(b"cposix\nmkdir\n", text, b"\x85R"))
    stacked = _opcodes(b"\x8c\x05posix\x8c\x05mkdir\x93", text, b"\x85R")
    found["function named by text"] = partial(with_pickle, stacked)
    found["instance"] = partial(with_pickle, b"(S'mkdir " + goal.encode() + b"'\niposix\nsystem\n.")
    return found


def _deflated_bomb() -> bytes:
    def grown(name: str, data: bytes) -> bytes:
        return bytes(2**26) if name.endswith("data/0") else data

    return rezipped(torch_bytes({"a": torch.zeros(4)}), grown, zipfile.ZIP_DEFLATED)


OVERLAP = {"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}
BOMBS: dict[str, Callable[[], bytes]] = {
    "deep lists": lambda: with_pickle(_deep(400_000)),
    "more opcodes than any weights": lambda: with_pickle(_opcodes(b"N" * 1_500_000)),
    "text of four gigabytes": lambda: with_pickle(_opcodes(b"X\xff\xff\xff\xff", b"abc")),
    "keys that take forever": lambda: with_pickle(_keys_that_take_forever()),
    "number of many digits": lambda: with_pickle(_opcodes(b"\x8a\xff" + b"\x7f" * 255)),
    "deflated members": _deflated_bomb,
    "header of a gigabyte": lambda: safetensors_bytes(b"{}", length=2**30),
    "header of 2 ** 60 bytes": lambda: safetensors_bytes(b"{}", length=2**60),
    "deep header": lambda: safetensors_bytes(b'{"a":' + b"[" * 100_000),
    "tensors that overlap": lambda: safetensors_bytes(OVERLAP, bytes(12)),
    "tensor beyond the end": lambda: safetensors_bytes({"a": tensor("F32", [2**40], 0, 2**42)}, bytes(8)),
    "shape that overflows": lambda: safetensors_bytes({"a": tensor("F32", [2**40, 2**40], 0, 8)}, bytes(8)),
    "negative shape": lambda: safetensors_bytes({"a": tensor("F32", [-2], 0, 8)}, bytes(8)),
    "view of a terabyte": lambda: torch_bytes({"model": {"a": torch.zeros(1).expand(2**20, 2**20)}}),
    "huge names": lambda: torch_bytes({"model": {"a" * 10**6: torch.zeros(1)}}),
    "many names": lambda: torch_bytes({"model": OrderedDict((f"name{n}", torch.zeros(1)) for n in range(3000))}),
    "names that clear the screen": lambda: torch_bytes({"model": {"\x1b[2J\nok": torch.zeros(1)}}),
}
"""Files that would fill memory, take forever or garble a terminal, by name."""
