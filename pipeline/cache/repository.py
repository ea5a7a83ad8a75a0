"""The git repository that contains the code."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple


class Head(NamedTuple):
    """The checked-out commit."""

    commit: str
    """SHA-1, in hex."""
    dirty: bool
    """Whether files differ from the commit, untracked files included."""


def head() -> Head | None:
    """The commit of the running code; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run([*git, "status", "-s"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return Head(commit.stdout.strip(), bool(changed.stdout.strip()))
