"""What the record of an artifact says: the last numbers that its training measured."""

from __future__ import annotations

import json
from pathlib import Path

from stages.runtime.artifact import RECORD


def last_metrics(artifact: Path, *names: str) -> dict[str, float]:
    """The last value of each of `names` in an artifact's metrics.jsonl, of those that it has."""
    found: dict[str, float] = {}
    path = artifact / RECORD / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        found |= {name: value for name, value in json.loads(line).items() if name in names}
    return {name: found[name] for name in names if name in found}
