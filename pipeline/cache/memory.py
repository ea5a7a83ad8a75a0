"""Files of a home that remember what could be computed again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from stages.runtime.artifact import write_json

logger = logging.getLogger(__name__)


def remember(path: Path, value: Any) -> None:
    """Write a value as JSON. In a home that cannot be written it is computed again the next time."""
    try:
        write_json(path, value)
    except OSError as error:
        logger.info("%s is not written: %s", path, error.strerror)
