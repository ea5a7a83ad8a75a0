"""Fingerprints of code, remembered in a file so that a command does not parse all code again.

A remembered fingerprint is valid while the file metadata (size, times, inode) of every module it depends on is
unchanged. Modules that were looked up and not found count too. If the file is lost or damaged, fingerprints are
computed again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.cache import code_reader, fingerprint, module_code
from pipeline.cache.fingerprint import Code, Fingerprint, Place
from pipeline.cache.memory import remember
from stages.runtime.artifact import read_json


class CodeMemory:
    """Fingerprints of `code`, remembered in the file `path`."""

    def __init__(self, code: Code, path: Path) -> None:
        self._code, self._path = code, path
        self._rules = _digest([str(code.root), *sorted(code.neutral), "|", *sorted(code.counted), *_own_code()])
        self._entries: dict[str, Any] | None = None

    def fingerprint(self, entry: Place) -> Fingerprint:
        """Fingerprint of the function `entry`; see `Code.fingerprint`."""
        name = f"{self._rules}:{':'.join(entry)}"
        entries = self._read()
        known = self._known(entries.get(name))
        if known is not None:
            return known
        fresh = self._code.fingerprint(entry)
        modules = {module: self._metadata(module) for module in self._code.looked_up}
        entries[name] = {"modules": modules, **asdict(fresh)}
        remember(self._path, entries)
        return fresh

    def _known(self, entry: Any) -> Fingerprint | None:
        """The fingerprint in an entry; None when it is not there or damaged, or when a file has changed."""
        try:
            modules, known = entry["modules"], Fingerprint(entry["digests"], entry["definitions"])
            unchanged = all(self._metadata(module) == was for module, was in modules.items())
        except (TypeError, KeyError, AttributeError):
            return None
        return known if unchanged else None

    def _read(self) -> dict[str, Any]:
        if self._entries is None:
            try:
                found = read_json(self._path)
            except (OSError, ValueError):
                found = {}
            self._entries = found if isinstance(found, dict) else {}
        return self._entries

    def _metadata(self, module: str) -> list[int] | None:
        path = self._code.file_of(module)
        return None if path is None else _metadata(path)


def _own_code() -> list[str]:
    """Metadata of the modules that compute fingerprints: an edit there can change every fingerprint."""
    return [json.dumps(_metadata(Path(str(module.__file__)))) for module in (fingerprint, code_reader, module_code)]


def _metadata(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _digest(words: list[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
