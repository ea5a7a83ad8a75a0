"""Training checkpoints: written aside and renamed, the newest whole one is where a killed run goes on."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch

from stages.runtime.artifact import write_atomic

logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{9})\.pt")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> None:
    """Write the state after `step` optimiser steps, then remove all but the newest `keep` checkpoints."""
    write_atomic(folder / f"step-{step:09d}.pt", lambda file: torch.save(state, file))
    for path in _newest_first(folder)[keep:]:
        path.unlink()


def load_latest(folder: Path, map_location: torch.device) -> dict[str, Any] | None:
    """State of the newest readable checkpoint, or None when there is none. An unreadable one is named and passed by."""
    for path in _newest_first(folder):
        try:
            state: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # on damaged bytes torch.load raises almost anything
            logger.warning("checkpoint %s cannot be read (%s): going on from the one before", path, error)
            continue
        return state
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)), reverse=True)
