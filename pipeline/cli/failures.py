"""What an error means to the person at the command line: one line, and an exit code."""

from __future__ import annotations

from typing import NamedTuple

import typer

from conf.load import SettingsError
from pipeline.launch import StageFailed
from stages.runtime.errors import InputError

FAILURE, USER_ERROR = 1, 2


class Failure(NamedTuple):
    """How a command ends badly."""

    line: str
    code: int


def describe_failure(error: Exception) -> Failure:
    """The line and the exit code of an error: 2 when the user can mend it, else 1.

    Errors of our own, and of files, say what they are; any other is a fault of the program, and its type says more than
    its text.
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
    return " ".join(text.split())
