"""The command `dpar`: its command groups and exit codes."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from pipeline.cli import cluster, doctor, measure, patches, plan, run, sample, upkeep
from pipeline.cli.failures import FAILURE, describe_failure
from pipeline.cli.screen_log import warnings_on_screen
from pipeline.cli.streams import drop_output, open_streams, use_utf8
from pipeline.launchers.inherited import forget_other_launchers

logger = logging.getLogger("pipeline")
INTERRUPTED = 130

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train, sample and score a DPAR model from a folder of images. Unchanged stages are not run again.",
)
for group in (run, plan, doctor, cluster, measure, patches, sample, upkeep):
    app.add_typer(group.app)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    logger.setLevel(logging.DEBUG if debug else logging.NOTSET)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. An error is printed as one line on standard error."""
    forget_other_launchers()
    try:
        with warnings_on_screen():
            code = app(args=list(arguments) or ["--help"], prog_name="dpar", standalone_mode=False)
    except Exception as error:
        if logger.isEnabledFor(logging.DEBUG):
            traceback.print_exception(error)
        failure = describe_failure(error)
        typer.echo(f"dpar: {failure.line}", err=True)
        return failure.code
    if code == INTERRUPTED:  # typer returns it instead of raising KeyboardInterrupt
        typer.echo("dpar: interrupted; run again to resume", err=True)
    return int(code or 0)


def main() -> None:
    """Entry point of the command `dpar`."""
    use_utf8()
    open_streams()
    code = run_command(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it any more, or the disk is full
        drop_output()
        code = code or FAILURE
    sys.exit(code)


if __name__ == "__main__":
    main()
