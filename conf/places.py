"""Paths in settings: absolute from the moment they are read, so that they mean the same in every process."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

CONF_DIR = Path(__file__).resolve().parent
_BESIDE = "conf:"  # begins the path of a file in this folder
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LONGEST = 4095  # bytes of a path on Linux
_LONGEST_HOME = 470  # bytes; SQLite opens no database whose path has more than 504


def absolute(value: Any) -> Path:
    """The absolute path that a text means: `~` and `~user` are homes, relative paths begin in the current folder.

    Raises:
        ValueError: The text is no path of this machine.
    """
    if not isinstance(value, str | Path):
        raise ValueError(f"found {value!r}, expected the path of a file or folder")
    text = str(value)
    if text.startswith(_BESIDE):
        return CONF_DIR / text.removeprefix(_BESIDE)
    if problem := _problem(text):
        raise ValueError(f"found {text[:200]!r}, {problem}")
    try:
        return expanded(text).absolute()
    except FileNotFoundError:
        raise ValueError(f"found {text!r} in a current folder that was removed, expected an absolute path") from None


def expanded(path: str | Path) -> Path:
    """The path with the home that `~` or `~user` at its start stands for.

    Raises:
        ValueError: There is no such home.
    """
    text = str(path)
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(text)  # `./~` is a file of this name
    except RuntimeError:
        raise ValueError(f"found {text!r}, and there is no home of {text.partition('/')[0]}") from None


def _problem(text: str) -> str | None:
    """Why a text is no path, in words that follow it; None if it is one."""
    if not text:
        return "expected a path"
    if _ADDRESS.match(text):
        return "an address, expected the path of a file or folder"
    if any(character < " " or character == "\x7f" for character in text):
        return "expected a path without control characters"
    try:
        too_long = len(text.encode()) > _LONGEST
    except UnicodeEncodeError:
        return "expected a path in UTF-8"
    return f"expected at most {_LONGEST} bytes" if too_long else None


Place = Annotated[Path, BeforeValidator(absolute)]
"""A path in the settings."""


def _folder(path: Path) -> Path:
    """The path, checked to be that of a folder, or of one that can be made: nothing else is in its way."""
    nearest = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not os.path.isdir(nearest):
        raise ValueError(f"found {str(path)!r}, expected a folder: {nearest} is none")
    if (length := len(os.fsencode(os.path.realpath(path)))) > _LONGEST_HOME:
        raise ValueError(
            f"found a path of {length} bytes, expected at most {_LONGEST_HOME}: SQLite opens no database deeper down"
        )
    return path


Home = Annotated[Place, AfterValidator(_folder)]
"""Folder of the artifacts."""
