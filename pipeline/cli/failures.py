"""Errors at the command line: one line of text and an exit code."""

from __future__ import annotations

from typing import NamedTuple

import typer

from conf.load import SettingsError
from pipeline.launch import StageFailed
from stages.images.names import shown
from stages.runtime.errors import InputError

FAILURE, USER_ERROR = 1, 2


class Failure(NamedTuple):
    """Error line and exit code of a failed command."""

    line: str
    code: int


def describe_failure(error: Exception) -> Failure:
    """Line and exit code of an error: 2 for user errors, else 1.

    Known errors and file errors have messages for users. Any other error is a bug: its line starts with its type.
    """
    if isinstance(error, typer.Abort):
        return Failure("stopped", FAILURE)
    if isinstance(error, typer.TyperException):
        said = getattr(error, "format_message", error.__str__)()
        return Failure(_one_line(said), getattr(error, "exit_code", FAILURE))
    if isinstance(error, (SettingsError, InputError)):
        return Failure(_one_line(str(error)), USER_ERROR)
    if isinstance(error, StageFailed):
        return Failure(_one_line(str(error)), error.code)
    if isinstance(error, (OSError, RuntimeError)):
        return Failure(_one_line(str(error)), FAILURE)
    return Failure(_one_line(f"{type(error).__name__}: {error} (`dpar --debug` shows where)"), FAILURE)


def _one_line(text: str) -> str:
    """The text in one line; what a terminal would obey and what is no UTF-8, as in names of files, is escaped."""
    return shown(" ".join(text.split()))
