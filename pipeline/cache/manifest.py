"""The manifest of an artifact: its key, the parts of the key, and its files. It is sealed, and checked when read."""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from stages.runtime.artifact import RECORD, read_json

MANIFEST = "manifest.json"
SCHEMA = 2  # layout of artifacts and manifests; raise it when the layout changes, and every stage runs again
Parts = dict[str, Any]

_STAGE = r"[a-z][a-z0-9_]*"
_KEY = re.compile(rf"({_STAGE})-[0-9a-f]{{20}}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ManifestError(ValueError):
    """An invalid manifest. The message says what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Identity, files and origin of a finished artifact."""

    key: str
    stage: str
    parts: Parts
    definitions: dict[str, str]
    """Digest of the text of each definition in the stage's code, by "module:name"; not in the key, for `dpar why`."""
    digest: str
    """Content digest, without files in `record/`. It is part of the keys of later stages."""
    files: dict[str, list[Any]]
    """[bytes, sha256] by path, without `manifest.json` and `record/log.txt`."""
    created: float
    """Seconds since the epoch."""
    duration_s: float
    environment: dict[str, Any] = field(default_factory=dict)
    """Not in the key: commit, host platform, Python version."""
    accepted: str | None = None
    """Why the artifact is valid for a key that it was not made for; None if it was made for this key."""

    def sealed(self) -> dict[str, Any]:
        """Content of the manifest file: all fields, and the seal over them."""
        content = asdict(self)
        return content | {"seal": _seal(content)}


def key_of(parts: Parts) -> str:
    """The key: stage and digest of the parts, e.g. `train-1f0c…`. It is the name of the artifact's folder."""
    return f"{parts['stage']}-{hashlib.sha256(_canonical(parts)).hexdigest()[:20]}"


def stage_of(key: str) -> str | None:
    """Stage of a key; None if the text is not a key."""
    match = _KEY.fullmatch(key)
    return match[1] if match else None


def content_digest(files: Mapping[str, list[Any]]) -> str:
    """Digest over paths and contents of files, without those in `record/`."""
    lines = [f"{name} {digest}" for name, (_, digest) in sorted(files.items()) if not name.startswith(f"{RECORD}/")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_manifest(folder: Path, key: str | None = None) -> Manifest:
    """Manifest of the artifact in a folder. Files that it lists are not opened.

    Args:
        folder: Folder of the artifact.
        key: Expected key; None for the name of the folder.

    Raises:
        ManifestError: The manifest is missing or invalid.
    """
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ManifestError(f"{MANIFEST} is not a regular file")
        content = read_json(path)
    except FileNotFoundError as error:
        raise ManifestError(f"{MANIFEST} is missing") from error
    except (OSError, RecursionError) as error:
        raise ManifestError(f"{MANIFEST} cannot be read: {error}") from error
    except ManifestError:
        raise
    except ValueError as error:
        raise ManifestError(f"{MANIFEST} is not JSON: {error}") from error
    return parse_manifest(content, folder.name if key is None else key)


def parse_manifest(content: Any, key: str) -> Manifest:
    """The manifest, from the content of its file.

    Raises:
        ManifestError: A field is missing or unknown, has a wrong type or contradicts another.
    """
    if not isinstance(content, dict):
        raise ManifestError(f"{MANIFEST} does not hold a JSON object")
    parts = content.get("parts")
    if "seal" not in content and isinstance(parts, dict) and parts.get("schema") != SCHEMA:
        raise ManifestError(
            f"{MANIFEST} has schema {parts.get('schema')}, expected {SCHEMA}: written by another version"
        )
    expected = {each.name for each in fields(Manifest)} | {"seal"}
    if odd := sorted(expected ^ content.keys()):
        raise ManifestError(f"{MANIFEST} has missing or unknown fields: {', '.join(odd)}")
    for name, is_right in _CHECKS.items():
        if not is_right(content[name]):
            raise ManifestError(f"{MANIFEST}: field {name} is not valid")
    seal = content.pop("seal")
    manifest = Manifest(**content)
    if manifest.key != key or stage_of(key) != manifest.stage:
        raise ManifestError(f"{MANIFEST} has key {manifest.key}, the folder is {key}")
    if manifest.parts["stage"] != manifest.stage or key_of(manifest.parts) != key:
        raise ManifestError(f"{MANIFEST}: key does not match parts")
    if content_digest(manifest.files) != manifest.digest:
        raise ManifestError(f"{MANIFEST}: digest does not match files")
    if _seal(content) != seal:
        raise ManifestError(f"{MANIFEST} was modified: its seal does not match")
    return manifest


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def _canonical(value: Any) -> bytes:
    """Canonical JSON of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _is_dict_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


def _is_name(name: str) -> bool:
    """Whether a path stays below the artifact's folder and is not the manifest itself."""
    parts = name.split("/")
    return name != MANIFEST and not {"", ".", ".."} & set(parts) and "\0" not in name and "\\" not in name


def _are_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_name(name) and isinstance(file, list) and len(file) == 2 and _is_count(file[0]) and _is_sha256(file[1])
        for name, file in value.items()
    )


def _are_parts(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == _PARTS.keys()
        and all(is_right(value[name]) for name, is_right in _PARTS.items())
    )


_PARTS: dict[str, Callable[[Any], bool]] = {
    "schema": _is_count,
    "stage": _is_text,
    "settings": lambda value: isinstance(value, dict),
    "code": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "inputs": _is_dict_of(_is_sha256),
    "packages": _is_dict_of(_is_text),
    "external": lambda value: value is None or _is_sha256(value),
}
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "key": _is_text,
    "stage": _is_text,
    "parts": _are_parts,
    "definitions": _is_dict_of(_is_text),
    "digest": _is_sha256,
    "files": _are_files,
    "created": _is_seconds,
    "duration_s": _is_seconds,
    "environment": lambda value: isinstance(value, dict),
    "accepted": lambda value: value is None or isinstance(value, str),
    "seal": _is_sha256,
}
