"""Warnings on the screen, one line each."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer

_PACKAGES = ("pipeline", "stages", "conf")


class _Screen(logging.Handler):
    """Prints on standard error as it is now: a progress bar puts itself in its place and moves below the line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record as one line."""
        try:
            typer.echo(f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}", err=True)
        except Exception:
            self.handleError(record)


@contextmanager
def warnings_on_screen() -> Iterator[None]:
    """Print warnings of our packages. The root logger is not relied on: Prefect sets it up so that it prints none."""
    screen = _Screen(logging.WARNING)
    loggers = [logging.getLogger(name) for name in _PACKAGES]
    for logger in loggers:
        logger.addHandler(screen)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(screen)
