"""The command `dpar`. Errors are one line on standard error; exit codes: 1 failure, 2 the user's to mend, 130 stopped."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from conf.load import SettingsError, describe, load_settings, names
from conf.schema import RuntimeConfig, Settings
from pipeline import display
from pipeline.graph import STAGES, Stage, downstream, order, upstream
from stages.errors import InputError

logger = logging.getLogger(__name__)
STOPPED = 130

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From a folder of images to a trained, sampled and scored DPAR model; what is unchanged is not made again.",
)
mlflow_app = typer.Typer(no_args_is_help=True, help="The tracking server.")
app.add_typer(mlflow_app, name="mlflow")

Preset = Annotated[str | None, typer.Option(help="Settings to start from; `dpar presets` lists them.")]
Ablation = Annotated[str | None, typer.Option(help="Change to the preset; `dpar presets` lists them.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="STAGE.FIELD=VALUE", help="One setting; may be given again.")
]
From = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Start here; what it needs must be cached.")]
Until = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")]
Force = Annotated[
    list[str], typer.Option("--force", metavar="STAGE", help="Make it again even if cached; may be given again.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StageName = Annotated[str, typer.Argument(metavar="STAGE", help=f"One of {', '.join(STAGES)}.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    logger.setLevel(logging.DEBUG if debug else logging.NOTSET)


@app.command()
def run(
    preset: Preset = None,
    ablation: Ablation = None,
    from_stage: From = None,
    until_stage: Until = None,
    force: Force = [],
    overrides: Overrides = [],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and why.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make every artifact that is not made yet, in the order of the graph, and show the scores."""
    request = Request.resolve(preset, ablation, overrides)
    wanted = select(from_stage, until_stage)
    statuses = request.forced(request.plan(), force)
    _require_cached(statuses, before=wanted)
    asked = [status for status in statuses if status.stage in wanted]
    if dry_run:
        _show_statuses(asked, as_json=as_json)
        return
    if all(status.state == "cached" for status in asked):
        _show_statuses(asked, as_json=as_json)
    else:
        request.run(...)
    ...
