"""New lines of a stage's log, for the log of its task run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.runtime.artifact import RECORD

MAX_LINES = 40  # at once; the log file has all lines


@dataclass(frozen=True)
class LogTail:
    """The log of a work folder or artifact from an offset on.

    Attributes:
        folder: Work folder or artifact of the stage.
        offset: Bytes read before.
    """

    folder: Path
    offset: int

    @staticmethod
    def path(folder: Path) -> Path:
        """Path of a stage's log."""
        return folder / RECORD / "log.txt"

    def lines(self) -> tuple[list[str], int]:
        """Whole new lines, at most the last `MAX_LINES`, and the offset behind them."""
        try:
            with self.path(self.folder).open("rb") as file:
                file.seek(self.offset)
                text = file.read()
        except OSError:  # not written yet
            return [], self.offset
        whole = text[: text.rfind(b"\n") + 1]
        lines = whole.decode(errors="replace").replace("\0", "").splitlines()
        if len(lines) > MAX_LINES:
            lines = [f"({len(lines) - MAX_LINES} lines left out)", *lines[-MAX_LINES:]]
        return lines, self.offset + len(whole)
