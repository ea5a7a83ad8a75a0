"""Errors with a message for people. The message is one line: found, expected, where, what to do."""

from __future__ import annotations

import signal


class InputError(ValueError):
    """A user error: a setting, path, image folder or weights file cannot be used. Exit code 2."""


class StaleIndexError(InputError):
    """An image differs from the indexed one. The next run indexes the images again, even if file metadata are equal."""


class ArtifactError(RuntimeError):
    """An artifact or a store is damaged, incomplete, or has another format. Exit code 1."""


class Interrupted(RuntimeError):
    """Training was asked to stop by a signal and has written a checkpoint. Exit code 128 + the signal's number."""

    def __init__(self, number: int, step: int, steps: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"interrupted by {name} after step {step} of {steps}, which is saved; run again to resume")
        self.number = number
