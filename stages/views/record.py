"""Metrics in the record of an artifact."""

from __future__ import annotations

import json
from pathlib import Path

from stages.runtime.artifact import RECORD


def last_metrics(artifact: Path, *names: str) -> dict[str, float]:
    """Last value of each of `names` in an artifact's metrics.jsonl. Missing names are left out."""
    found: dict[str, float] = {}
    path = artifact / RECORD / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        found |= {name: value for name, value in json.loads(line).items() if name in names}
    return {name: found[name] for name in names if name in found}
