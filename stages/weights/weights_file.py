"""Weights files of other programs: safetensors, and both formats of `torch.save`, read tensor by tensor.

Opening a file reads names, shapes and types. A tensor is read when it is asked for, so that nothing is allocated before
the model has said what it wants. No code in a file is executed.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages.runtime.errors import InputError
from stages.weights.kinds import looks_like_safetensors, open_weights_file
from stages.weights.pickled import MOST_BYTES, PickleReader, Storage, Strided, UnreadableWeights

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch.save before version 1.6
_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_MOST_HEADER = 16 * 2**20  # of safetensors; a hundred thousand tensors
_DAMAGE = (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error, struct.error)


@dataclass(frozen=True)
class Entry:
    """A tensor that is still to be read.

    Attributes:
        shape: Sizes of its dimensions.
        dtype: Name of the type of its elements, e.g. `float32`.
        read_bytes: Bytes that have to be read for it: a storage may be larger than a tensor in it.
        read: Reads it. Raises InputError if the file is damaged or cut off.
    """

    shape: tuple[int, ...]
    dtype: str
    read_bytes: int
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        """The entry of a tensor in memory."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), 0, lambda: tensor)


@contextmanager
def open_weights(path: Path, missing: str) -> Iterator[WeightsFile]:
    """Open a weights file of another program, whatever its name.

    Raises:
        InputError: The file is missing (then the message is `missing`), is of another kind, damaged or cut off, or
            holds objects that no weights need.
    """
    with open_weights_file(path, missing) as file, ExitStack() as stack:
        with _naming(path):
            head = file.read(16)
            if looks_like_safetensors(head):
                if (length := int.from_bytes(head[:8], "little")) > _MOST_HEADER:
                    raise UnreadableWeights(
                        f"has a header of {length:,} bytes, expected at most {_MOST_HEADER:,}: it is damaged"
                    )
                found: WeightsFile = _Safetensors(path, stack.enter_context(safe_open(path, framework="pt")))
            elif head.startswith(b"PK\x03\x04"):
                found = _TorchZip(path, file)
            elif re.match(rb"\x80[\x02-\x05]", head):
                found = _LegacyTorch(path, file)
            else:
                raise UnreadableWeights(_described(file))
        yield found


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn errors of libraries that read `path` into one line about it."""
    try:
        yield
    except UnreadableWeights as error:
        raise InputError(f"{path} {error}") from error
    except SafetensorError as error:
        raise InputError(f"{path} is {_damage_of_safetensors(str(error))}: get the file again") from error
    except _DAMAGE as error:
        why = " ".join(str(error).split())[:150]
        raise InputError(f"{path} is damaged or cut off ({why}): get the file again") from error


def _described(file: IO[bytes]) -> str:
    file.seek(0)
    text = file.read(60).decode("ascii", "replace").split("\n")[0][:40]
    what = f"a text file that begins with {text!r}" if text.isprintable() and text.isascii() else "of no known format"
    return f"is {what}, expected weights: safetensors, or a file of torch.save"


def _damage_of_safetensors(message: str) -> str:
    what = message.removeprefix("Error while deserializing header: ")[:150]
    if "not fully covered" in what or "length" in what:
        return "a safetensors file that is cut off, or longer than its header says"
    if "invalid offset" in what:
        return f"a damaged safetensors file, whose tensors overlap or leave gaps ({what})"
    return f"a damaged safetensors file ({what})"


class WeightsFile(ABC):
    """An open weights file.

    Attributes:
        path: Where it is.
        format: Name of its format.
        tree: What it holds: a dictionary of tensors (`Strided` or `Named`) and other values, possibly nested, or
            something else.
        metadata: Metadata of a safetensors file.
    """

    format: ClassVar[str]
    tree: Any

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.path, self.metadata = path, metadata

    def entry(self, tensor: Any) -> Entry:
        """The entry of a tensor of `tree`."""

        def read() -> Tensor:
            with _naming(self.path):
                return self._read(tensor)

        return Entry(tensor.shape, tensor.dtype, self._read_bytes(tensor), read)

    @abstractmethod
    def _read(self, tensor: Any) -> Tensor:
        """The values of a tensor of `tree`."""

    @abstractmethod
    def _read_bytes(self, tensor: Any) -> int:
        """Bytes that have to be read for it, if they are more than its shape says."""


@dataclass(frozen=True)
class Named:
    """A tensor of a safetensors file."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class _Safetensors(WeightsFile):
    format = "safetensors"

    def __init__(self, path: Path, opened: Any) -> None:
        super().__init__(path, opened.metadata() or {})
        self.tree = {}
        self._opened = opened
        for name in opened.keys():  # noqa: SIM118, it is no dictionary
            part = opened.get_slice(name)
            dtype = part.get_dtype()
            self.tree[name] = Named(name, tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype))

    def _read(self, tensor: Named) -> Tensor:
        read: Tensor = self._opened.get_tensor(tensor.name)
        return read

    def _read_bytes(self, tensor: Named) -> int:
        return 0  # as many as its shape says: the library has compared them


class _Torch(WeightsFile):
    """What both formats of torch.save have in common: tensors are views of storages."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        super().__init__(path, {})
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def _read(self, tensor: Strided) -> Tensor:
        dtype = getattr(torch, tensor.dtype)
        if 0 in tensor.shape:
            return torch.empty(tensor.shape, dtype=dtype)
        if self._last[0] != tensor.storage.key:
            self._last = (tensor.storage.key, torch.frombuffer(self._storage(tensor.storage), dtype=dtype))
        return self._last[1].as_strided(tensor.shape, tensor.stride, tensor.offset)

    def _read_bytes(self, tensor: Strided) -> int:
        return _bytes_of(tensor.storage)

    @abstractmethod
    def _storage(self, storage: Storage) -> bytearray:
        """The bytes of a storage."""


class _TorchZip(_Torch):
    """The format since torch 1.6: a zip archive with a pickle, and an uncompressed member for each storage."""

    format = "torch zip"

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        super().__init__(path, file)
        self._archive = zipfile.ZipFile(file)
        self._members = {info.filename: info for info in self._archive.infolist()}
        if len(self._members) < len(self._archive.infolist()):
            raise UnreadableWeights("is a zip archive with two members of one name")
        self._root = next(name for name in self._members if name.endswith("/data.pkl")).removesuffix("data.pkl")
        if f"{self._root}byteorder" in self._members and self._member("byteorder", 16).strip() != b"little":
            raise UnreadableWeights("was written on a big-endian machine, expected little-endian numbers")
        self.tree = PickleReader(BytesIO(self._member("data.pkl", MOST_BYTES))).read()

    def _storage(self, storage: Storage) -> bytearray:
        data = self._member(f"data/{storage.key}", _bytes_of(storage))
        if len(data) != _bytes_of(storage):
            raise UnreadableWeights(
                f"has {len(data)} bytes for storage {storage.key[:40]!r}, expected {_bytes_of(storage)}"
            )
        return data

    def _member(self, name: str, most: int) -> bytearray:
        info = self._members.get(self._root + name)
        if info is None:
            raise UnreadableWeights(f"lacks its member {name[:60]!r}: get the file again")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise UnreadableWeights(
                "has compressed or encrypted members, which torch.save does not write: save the weights again"
            )
        if info.file_size > most or info.header_offset + info.file_size > self._size:
            raise UnreadableWeights(
                f"has a member {name[:60]!r} of {info.file_size:,} bytes, expected at most {min(most, self._size):,}"
            )
        data = bytearray()
        try:
            with self._archive.open(info) as member:
                while chunk := member.read(2**24):  # the last one compares the checksum
                    data += chunk
        except zipfile.BadZipFile as error:
            raise UnreadableWeights(
                f"is damaged in its member {name[:60]!r} ({str(error)[:80]}): get the file again, or save it again if "
                "it was written without checksums (torch.serialization.set_crc32_options)"
            ) from error
        return data


class _LegacyTorch(_Torch):
    """The format before torch 1.6: five pickles, then the storages, each behind its number of elements."""

    format = "torch legacy"

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        super().__init__(path, file)
        file.seek(0)
        stream = BytesIO(file.read(MOST_BYTES))
        reader = PickleReader(stream)
        if reader.read() != _MAGIC:
            raise UnreadableWeights(
                "is a Python pickle, expected weights: where you trust it, load it with the program that wrote it, and "
                "save the tensors with safetensors"
            )
        if reader.read() != _PROTOCOL:
            raise UnreadableWeights("is of an unknown version of torch.save")
        reader.read()  # the machine that wrote it
        self.tree = reader.read()
        self._starts: dict[str, int] = {}
        keys = reader.read()
        place = stream.tell()
        for key in keys:
            storage = reader.storages[key]
            self._starts[key] = place + 8
            place += 8 + _bytes_of(storage)
        if place > self._size:
            raise UnreadableWeights(f"is cut off: it has {self._size:,} bytes, expected {place:,}: get the file again")

    def _storage(self, storage: Storage) -> bytearray:
        self._file.seek(self._starts[storage.key] - 8)
        (numel,) = struct.unpack("<q", self._file.read(8))
        if numel != storage.numel:
            raise UnreadableWeights(f"has {numel} elements in storage {storage.key[:40]!r}, expected {storage.numel}")
        data = bytearray(_bytes_of(storage))
        if self._file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise UnreadableWeights("is cut off: get the file again")
        return data


def _bytes_of(storage: Storage) -> int:
    return storage.numel * getattr(torch, storage.dtype).itemsize
