"""Pickles written by `torch.save`, read as data: no object is made and no name is looked up, so nothing is executed.

`pickletools` parses the opcodes. A stack machine for those that `torch.save` writes builds dictionaries, lists and
tuples of plain values. Tensors become `Strided`, and every other object an `Unread`. Work and memory are linear in the
bytes of the pickle, which are limited. torch's own reader has no limits: keys that are nested tuples take it
exponential time, and a bytearray any memory.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

MOST_BYTES = 16 * 2**20  # of a pickle; that of three billion parameters has 100 kB
_MOST_OPCODES = 1_000_000  # two seconds, and thirty thousand tensors

DTYPES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "UntypedStorage": "uint8",
}
_PLAIN_OBJECTS = re.compile(  # what files with weights name; LlamaGen's also hold the command line of the training
    r"argparse\.Namespace|collections\.(OrderedDict|Counter)|_codecs\.encode|(builtins|__builtin__)\.(set|complex|bytearray)"
    r"|torch(\.cuda|\.storage)?\.\w+Storage"
    r"|torch\.(Size|Tensor|device|dtype|(u?int|q?int|quint|b?float|complex|bool|half|double|per_)\w*)"
    r"|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\._utils\._rebuild_\w+"
)


_TENSORS = {"_rebuild_qtensor": "a quantised tensor", "_rebuild_sparse_tensor": "a sparse tensor"}


class UnreadableWeights(ValueError):
    """A file that is damaged, or holds no weights. The message is the end of a sentence about it."""


@dataclass(frozen=True)
class Unread:
    """An object that is no tensor and no plain value, by name."""

    name: str


@dataclass(frozen=True)
class UnreadTensor(Unread):
    """A tensor of a kind that weights never have."""


@dataclass(frozen=True)
class Storage:
    """Memory of one or more tensors: its key in the file, its type, and its number of elements."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class Strided:
    """A tensor: a view of a storage. `offset` and `stride` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Name of the type of its elements."""
        return self.storage.dtype

    @property
    def span(self) -> int:
        """Elements of the storage from its start to the last one that the tensor reads."""
        if 0 in self.shape:
            return 0
        return self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)) + 1


class PickleReader:
    """Reads pickles from a stream, one after the other. `storages` are those met so far, by key."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.storages: dict[str, Storage] = {}
        self._stream = stream
        self._opcodes = 0

    def read(self) -> Any:
        """The value of the next pickle.

        Raises:
            UnreadableWeights: It is damaged, too large, or holds objects that no weights need.
        """
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        try:
            return self._run()
        except UnreadableWeights:
            raise
        except Exception as error:  # on damaged bytes pickletools and the stack raise almost anything
            raise UnreadableWeights(f"is damaged or cut off ({' '.join(str(error).split())[:100]})") from error

    def _run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self._stream):
            self._opcodes += 1
            if self._opcodes > _MOST_OPCODES:
                raise UnreadableWeights(f"describes its tensors in more than {_MOST_OPCODES:,} steps")
            if opcode.name == "STOP":
                return self._stack.pop()
            if (step := _STEPS.get(opcode.name)) is None:
                raise UnreadableWeights(
                    f"is a Python pickle with {opcode.name}, which torch.save does not write by default: where you "
                    "trust it, load it with the program that wrote it, and save the tensors with safetensors"
                )
            step(self, argument)
        raise UnreadableWeights("is cut off")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_marked(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _last(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._push(items)

    def _remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _append(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        """Keep entries with a string as key: no other one is a weight, and hashes of other keys can take forever."""
        if isinstance(self._stack[-1], dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            self._stack[-1].update((key, value) for key, value in pairs if type(key) is str)

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _name(self, argument: str) -> None:
        name = argument.replace(" ", ".")
        if not _PLAIN_OBJECTS.fullmatch(name):
            shown = name[:80] if name.isprintable() else repr(name[:80])
            raise UnreadableWeights(
                f"holds Python objects ({shown}), expected tensors alone: nothing in it was executed; where you trust "
                "it, load it with the program that wrote it, and save its state_dict() with safetensors"
            )
        self._push(Unread(name))

    def _call(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._push(_described(function, arguments))

    def _new(self, _: Any) -> None:
        _, kind = self._stack.pop(), self._stack.pop()
        self._push(kind)

    def _storage(self, _: Any) -> None:
        """Source: the persistent ids of torch.serialization: ("storage", type, key, device, number of elements)."""
        _, kind, key, _, numel, *_ = self._stack.pop()
        dtype = DTYPES.get(kind.name.rpartition(".")[2])
        if dtype is None or type(key) is not str or type(numel) is not int or numel < 0:
            raise UnreadableWeights(f"has a storage of an unknown kind ({kind.name})")
        storage = Storage(key, dtype, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise UnreadableWeights(f"describes its storage {key[:40]!r} twice, differently")
        self._push(storage)


def _described(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What a call would have made."""
    name = function.name if isinstance(function, Unread) else "an object"
    short = name.rpartition(".")[2]
    if short in {"_rebuild_tensor", "_rebuild_tensor_v2"}:
        return _strided(*arguments[:4])
    if short in {"_rebuild_parameter", "_rebuild_parameter_with_state"}:
        return arguments[0]
    if short == "_rebuild_from_type_v2":
        return _described(arguments[0], arguments[2])
    if name == "collections.OrderedDict":
        pairs = arguments[0] if arguments else []
        return {pair[0]: pair[1] for pair in pairs if type(pair[0]) is str}
    if name == "torch.Size":
        return arguments[0]
    if short == "_rebuild_tensor_v3":
        return UnreadTensor(f"a tensor of {getattr(arguments[6], 'name', 'an unknown type')}")
    if short.startswith("_rebuild_"):
        return UnreadTensor(_TENSORS.get(short, "a tensor of an unusual kind"))
    return Unread(name)


def _strided(storage: Any, offset: Any, shape: Any, stride: Any) -> Strided | Unread:
    if not isinstance(storage, Storage):
        return UnreadTensor("a tensor without a storage")
    tensor = Strided(storage, offset, tuple(shape), tuple(stride))
    numbers = (offset, *tensor.shape, *tensor.stride)
    if any(type(number) is not int or number < 0 for number in numbers) or len(tensor.shape) != len(tensor.stride):
        raise UnreadableWeights("has a tensor whose offset, shape and strides are not whole numbers from 0 on")
    if tensor.span > storage.numel:
        raise UnreadableWeights(
            f"has a tensor of shape {tensor.shape} that ends at element {tensor.span} of a storage of {storage.numel}"
        )
    return tensor


_STEPS: dict[str, Callable[[PickleReader, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda reader, _: None),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"), PickleReader._push
    ),
    "NONE": lambda reader, _: reader._push(None),
    "NEWTRUE": lambda reader, _: reader._push(True),
    "NEWFALSE": lambda reader, _: reader._push(False),
    "EMPTY_DICT": lambda reader, _: reader._push({}),
    "EMPTY_LIST": lambda reader, _: reader._push([]),
    "EMPTY_SET": lambda reader, _: reader._push([]),
    "EMPTY_TUPLE": lambda reader, _: reader._push(()),
    "MARK": PickleReader._mark,
    "TUPLE": lambda reader, _: reader._push(tuple(reader._pop_marked())),
    "TUPLE1": lambda reader, _: reader._last(1),
    "TUPLE2": lambda reader, _: reader._last(2),
    "TUPLE3": lambda reader, _: reader._last(3),
    "APPEND": lambda reader, _: reader._append([reader._stack.pop()]),
    "APPENDS": lambda reader, _: reader._append(reader._pop_marked()),
    "SETITEM": PickleReader._set_item,
    "SETITEMS": lambda reader, _: reader._set_items(reader._pop_marked()),
    "BINPUT": PickleReader._remember,
    "LONG_BINPUT": PickleReader._remember,
    "BINGET": lambda reader, index: reader._push(reader._memo[index]),
    "LONG_BINGET": lambda reader, index: reader._push(reader._memo[index]),
    "GLOBAL": PickleReader._name,
    "REDUCE": PickleReader._call,
    "NEWOBJ": PickleReader._new,
    "BUILD": lambda reader, _: reader._stack.pop() and None,
    "BINPERSID": PickleReader._storage,
}
