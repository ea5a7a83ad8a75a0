"""Fixtures for the tests of the command line."""

from collections.abc import Callable

import pytest

from pipeline.cli.main import run_command


@pytest.fixture
def user_error(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Run a command that must end with code 2 and one line on stderr; gives that line."""

    def user_error(command: list[str]) -> str:
        assert run_command(command) == 2
        output = capsys.readouterr()
        assert output.out == ""
        (line,) = output.err.splitlines()
        return line

    return user_error
