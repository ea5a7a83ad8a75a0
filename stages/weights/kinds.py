"""What a file is that was given as weights: pointers, web pages, archives and formats of other programs.

A file is known by its first bytes, not by its name. Nothing here imports torch: a wrong file is named before any stage
runs.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from stages.runtime.errors import InputError
from stages.runtime.regular_file import open_regular

_HEAD = 4096  # bytes that tell the kinds apart
_MOST_DIRECTORY = 8 * 2**20  # bytes of a zip archive's directory; a hundred thousand members
_LISTED = 3  # files of a folder or an archive that are named
TORCH_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of torch.save before version 1.6
_WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Kind:
    """A kind of file, as the end of a sentence, and what to do with it."""

    name: str
    advice: str


_BOM = b"\xef\xbb\xbf"  # that some programs write before text
_CONVERT = "load it with the program that wrote it, and save the tensors as safetensors"
_UNPACK = "unpack it and give the weights file in it"
_AGAIN = "get the file again"
_OTHER = "give the weights file itself"
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://hawser", "a Git LFS pointer, not the weights", "run `git lfs pull` in its repository"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull` in its repository"),
    (b"/annex/objects/", "a git-annex pointer, not the weights", "run `git annex get` on it"),
    (b"outs:\n- ", "a DVC pointer, not the weights", "run `dvc pull` in its repository"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras and TensorFlow write", _CONVERT),
    (b"GGUF", "a GGUF file of llama.cpp", _CONVERT),
    (b"lmgg", "a GGML file of llama.cpp", _CONVERT),
    (b"tjgg", "a GGML file of llama.cpp", _CONVERT),
    (b"fmgg", "a GGML file of llama.cpp", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"\x1f\x8b", "a gzip archive", f"{_UNPACK} (`gunzip`, or `tar -xf` for .tar.gz)"),
    (b"BZh", "a bzip2 archive", f"{_UNPACK} (`bunzip2`)"),
    (b"\xfd7zXZ\x00", "an xz archive", f"{_UNPACK} (`unxz`)"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", f"{_UNPACK} (`unzstd`)"),
    (b"\x04\x22\x4d\x18", "an lz4 archive", f"{_UNPACK} (`unlz4`)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", f"{_UNPACK} (`7z x`)"),
    (b"Rar!\x1a\x07", "a RAR archive", f"{_UNPACK} (`unrar x`)"),
    (b"PK\x05\x06", "an empty zip archive", _AGAIN),
    (b"\x08\x01\x12", "a SavedModel of TensorFlow", _CONVERT),
    (b"\x1f\x9d", "an archive of `compress`", f"{_UNPACK} (`uncompress`)"),
    (b"\xff\xfe", "a text file in UTF-16", _OTHER),
    (b"\xfe\xff", "a text file in UTF-16", _OTHER),
    (b"SQLite format 3\x00", "an SQLite database", _OTHER),
    (b"PAR1", "a Parquet table", _OTHER),
    (b"ARROW1", "an Arrow table", _OTHER),
    (b"%PDF-", "a PDF document", _OTHER),
    (b"\x89PNG\r\n", "a PNG image", _OTHER),
    (b"\xff\xd8\xff", "a JPEG image", _OTHER),
    (b"GIF8", "a GIF image", _OTHER),
    (b"\x7fELF", "a program or library (ELF)", _OTHER),
)
_NOT_OF_ZIP = (  # a part of a member's name, and what an archive with such a member is
    (("/constants.pkl", "/code/__torch__"), "a TorchScript archive, a program with its weights",
     "load it with torch.jit.load where you trust it, and save its state_dict() with safetensors"),
    (("serialized_exported_program", "/archive_format"), "a program of torch.export", _CONVERT),
    (("model.weights.h5",), "a Keras model", _CONVERT),
)  # fmt: skip


def require_weights_file(path: Path, setting: str) -> None:
    """Check, before any stage runs, that `path` is a regular file and of no kind that is known to hold no weights.

    Raises:
        InputError: It is none; `setting` is the setting that names it.
    """
    missing = f"{setting} is {path}, but there is no such file: set it to the path of the weights"
    try:
        open_weights_file(path, missing).close()
    except InputError as error:
        raise error if str(error) == missing else InputError(f"{setting}: {error}") from error


def open_weights_file(path: Path, missing: str) -> IO[bytes]:
    """Open a file that may hold weights.

    Raises:
        InputError: It is no regular file, or of a kind that is known to hold no weights. `missing` is the message for a
            file that does not exist.
    """
    try:
        os.stat(path)
    except FileNotFoundError as error:
        raise InputError(_broken_link(path) if path.is_symlink() else missing) from error
    except (OSError, ValueError):
        pass  # opening the file says why
    if os.path.isdir(path):
        raise InputError(_folder(path))
    file = open_regular(path)
    if kind := foreign_kind(file, path.name):
        file.close()
        raise InputError(f"{path} is {kind.name}, expected weights: {kind.advice}")
    file.seek(0)
    return file


def foreign_kind(file: IO[bytes], name: str) -> Kind | None:
    """What an open file is if it is known to hold no weights that can be read; None if it may hold some."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(_HEAD)
    if not head:
        return Kind("empty (0 bytes)", _AGAIN)
    if looks_like_safetensors(head) or head.startswith(TORCH_LEGACY):
        return None
    if not head.strip(b"\0"):
        return Kind(f"a file that begins with {len(head)} zero bytes, an unfinished download", _AGAIN)
    for start, kind, advice in _STARTS:
        if head.startswith(start):
            return Kind(kind, advice)
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(file, size)
    return _by_structure(head) or _markup(head) or _json_kind(file, head, size) or _by_name(name)


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a header below 4 GiB, and a header in JSON."""
    return head[4:9] == b"\0\0\0\0{"


def zip_names(file: IO[bytes]) -> list[str]:
    """Names of the members of a zip archive.

    Raises:
        zipfile.BadZipFile: The file is damaged or cut off, or its directory is larger than that of any weights.
    """
    if (size := _directory_bytes(file)) > _MOST_DIRECTORY:
        raise zipfile.BadZipFile(f"its directory has {size} bytes, expected at most {_MOST_DIRECTORY}")
    with zipfile.ZipFile(file) as archive:
        return archive.namelist()


def _directory_bytes(file: IO[bytes]) -> int:
    """Bytes of a zip archive's directory by the records at the end of the file, before `zipfile` reads it whole."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2**16 - 22))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        return 0
    (found,) = struct.unpack_from("<L", tail, at + 12)
    locator = at - 20  # of the record with the sizes of a large archive
    if locator >= 0 and tail[locator : locator + 4] == b"PK\x06\x07":
        record = locator - 56
        if record >= 0 and tail[record : record + 4] == b"PK\x06\x06":
            (found,) = struct.unpack_from("<Q", tail, record + 40)
    return int(found)


def _zip_kind(file: IO[bytes], size: int) -> Kind | None:
    try:
        names = zip_names(file)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, OSError, struct.error) as error:
        why = " ".join(str(error).split())[:100]
        return Kind(f"a zip archive that is damaged or cut off after {size:,} bytes ({why})", _AGAIN)
    for parts, kind, advice in _NOT_OF_ZIP:
        if any(part in f"/{name}" for part in parts for name in names):
            return Kind(kind, advice)
    if any(name.endswith("/data.pkl") and name.count("/") == 1 for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return Kind("a NumPy archive (.npz)", _CONVERT)
    return Kind(f"a zip archive with {_listing(names)}", _UNPACK)


def _by_structure(head: bytes) -> Kind | None:
    """Kinds that no fixed first bytes tell."""
    if head[257:262] == b"ustar":
        return Kind("a tar archive", f"{_UNPACK} (`tar -xf`)")
    if head[4:8] == b"TFL3":
        return Kind("a TensorFlow Lite model", _CONVERT)
    if re.match(rb"\x08[\x02-\x1f][\x12\x1a\x22\x32\x3a\x42]", head):  # a version, then another field
        return Kind("an ONNX model", _CONVERT)
    return None


def _markup(head: bytes) -> Kind | None:
    text = head.removeprefix(_BOM).lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<!--")):
        return Kind("an HTML page, not the weights", "the download needs a login or another address, get it again")
    if text.startswith((b"<?xml", b"<error")):
        return Kind("an XML document, an error of a download perhaps", _AGAIN)
    return None


def _json_kind(file: IO[bytes], head: bytes, size: int) -> Kind | None:
    if head.removeprefix(_BOM).lstrip()[:1] not in {b"{", b"["}:
        return None
    file.seek(0)
    try:
        value = json.loads(file.read(_MOST_DIRECTORY).removeprefix(_BOM))
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and isinstance(value.get("weight_map"), dict):
        shards = sorted({str(shard) for shard in value["weight_map"].values()})
        return Kind(
            f"the index of a checkpoint in {len(shards)} files ({_listing(shards)})",
            "load all of them where they were made, and save the tensors in one safetensors file",
        )
    return Kind(f"a JSON file of {size:,} bytes", _OTHER)


def _by_name(name: str) -> Kind | None:
    """Formats without a mark in their bytes, and parts of a whole."""
    suffix = Path(name).suffix.lower()
    known = {".onnx": "an ONNX model", ".pb": "a graph of TensorFlow", ".msgpack": "a file of Flax"}
    if suffix in known:
        return Kind(known[suffix], _CONVERT)
    if suffix == ".index" or ".data-0" in name:
        return Kind("a part of a TensorFlow checkpoint", _CONVERT)
    if suffix in {".part", ".crdownload", ".download", ".incomplete", ".aria2"}:
        return Kind(f"an unfinished download ({suffix})", "finish it, or get the file again")
    return None


def _folder(path: Path) -> str:
    """Says what a folder is that was given as a file."""
    try:
        names = sorted(entry.name for entry in os.scandir(path))
    except OSError:
        names = []
    weights = [name for name in names if name.endswith(_WEIGHTS_SUFFIXES)]
    if any(name.endswith(".index.json") for name in names):
        what, advice = "with a checkpoint in several files", "save its tensors in one safetensors file, and give that"
    elif any(name.endswith(".distcp") for name in names):
        what, advice = "with a checkpoint of torch.distributed", "run torch.distributed.checkpoint.format_utils on it"
    elif "saved_model.pb" in names:
        what, advice = "with a SavedModel of TensorFlow", _CONVERT
    elif weights:
        what, advice = f"with {_listing(weights)}", "give one of its files"
    else:
        what, advice = f"with {_listing(names)}" if names else "without files", "give a weights file"
    return f"{path} is a folder {what}, expected a weights file: {advice}"


def _broken_link(path: Path) -> str:
    goal = os.readlink(path)
    advice = "run `git annex get` on it" if "annex/objects" in goal else "get the file that it leads to"
    return f"{path} is a link to {goal}, which does not exist: {advice}"


def _listing(names: list[str]) -> str:
    shown = ", ".join(name[:60] if name.isprintable() else repr(name[:60]) for name in names[:_LISTED])
    return shown + (f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else "") if names else "no members"
