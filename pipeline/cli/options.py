"""Options shared by commands of `dpar`, the settings they resolve to, and output as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from conf.load import load_settings
from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.graph import STAGES

Preset = Annotated[str | None, typer.Option(metavar="NAME", help="Named settings to start from; see `dpar presets`.")]
Ablation = Annotated[str | None, typer.Option(metavar="NAME", help="Named change to the preset; see `dpar presets`.")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="STAGE.FIELD=VALUE",
        help="Override one setting, its value in JSON or as plain text; repeatable.",
        default_factory=list,
        show_default=False,
    ),
]
From = Annotated[
    str | None, typer.Option("--from", metavar="STAGE", help="First stage to run; its inputs must be cached.")
]
Until = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Last stage to run.")]
ForcedStages = Annotated[
    list[str],
    typer.Option(
        "--force",
        metavar="STAGE",
        help="Run this stage even if it is cached; repeatable.",
        default_factory=list,
        show_default=False,
    ),
]
Forced = Annotated[bool, typer.Option("--force", help="Run the stage even if it is cached.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show which stages would run, and why.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StageName = Annotated[str, typer.Argument(metavar="STAGE", help=f"One of {', '.join(STAGES)}.")]


def load(
    preset: str | None = None, ablation: str | None = None, overrides: Sequence[str] = ()
) -> tuple[Settings, RuntimeConfig]:
    """Resolve settings. At log level debug, later errors are printed with a traceback."""
    settings, runtime = load_settings(preset, ablation, overrides)
    if runtime.log_level == "debug":
        logging.getLogger("pipeline").setLevel(logging.DEBUG)
    return settings, runtime


def show_json(value: Any) -> None:
    """Print the output of a command as JSON."""
    typer.echo(json.dumps(value, indent=2, default=str))
