"""Options that several commands of `dpar` share, the settings they come to, and answers in JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from conf.load import load_settings
from conf.schema import RuntimeConfig, Settings
from pipeline.graph import STAGES

Preset = Annotated[str | None, typer.Option(metavar="NAME", help="Settings to start from; see `dpar presets`.")]
Ablation = Annotated[str | None, typer.Option(metavar="NAME", help="Change to the preset; see `dpar presets`.")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="STAGE.FIELD=VALUE",
        help="One setting; can be given again.",
        default_factory=list,
        show_default=False,
    ),
]
From = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Start here; what it reads must be cached.")]
Until = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")]
ForcedStages = Annotated[
    list[str],
    typer.Option(
        "--force", metavar="STAGE", help="Make it again; can be given again.", default_factory=list, show_default=False
    ),
]
Forced = Annotated[bool, typer.Option("--force", help="Make it again though it is cached.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be made, and why.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StageName = Annotated[str, typer.Argument(metavar="STAGE", help=f"One of {', '.join(STAGES)}.")]


def load(
    preset: str | None = None, ablation: str | None = None, overrides: Sequence[str] = ()
) -> tuple[Settings, RuntimeConfig]:
    """Resolve settings; at log level debug, errors come with their traceback from here on."""
    settings, runtime = load_settings(preset, ablation, overrides)
    if runtime.log_level == "debug":
        logging.getLogger("pipeline").setLevel(logging.DEBUG)
    return settings, runtime


def show_json(value: Any) -> None:
    """Print a command's answer."""
    typer.echo(json.dumps(value, indent=2, default=str))
