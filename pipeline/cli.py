"""The command `dpar`. Errors are one line on standard error; exit codes: 1 failure, 2 the user's to mend, 130 stopped."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from conf.load import SettingsError, describe, load_settings, names
from conf.schema import RuntimeConfig, Settings
from pipeline import bench as gates
from pipeline import cache, display, report, runner, selection
from pipeline.graph import STAGES
from pipeline.launch import StageFailed
from stages.errors import InputError

logger = logging.getLogger(__name__)
INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From a folder of images to a trained, sampled and scored DPAR model. What is unchanged is not made again.",
)
mlflow_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The tracking store.")
app.add_typer(mlflow_app, name="mlflow")

Preset = Annotated[str | None, typer.Option(metavar="NAME", help="Settings to start from; see `dpar presets`.")]
Ablation = Annotated[str | None, typer.Option(metavar="NAME", help="Change to the preset; see `dpar presets`.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="STAGE.FIELD=VALUE", help="Change one setting; can be given again.")
]
From = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Start here; what it reads must be cached.")]
Until = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")]
Forced = Annotated[
    list[str], typer.Option("--force", metavar="STAGE", help="Make it again though it is cached; can be given again.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be made, and why.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StageName = Annotated[str, typer.Argument(metavar="STAGE", help=f"One of {', '.join(STAGES)}.")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logger.setLevel(logging.DEBUG if debug else logging.NOTSET)


@app.command()
def run(
    preset: Preset = None,
    ablation: Ablation = None,
    from_stage: From = None,
    until_stage: Until = None,
    force: Forced = [],
    overrides: Overrides = [],
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make what is not made yet, in the order of the graph, and show the scores."""
    settings, runtime = load_settings(preset, ablation, overrides)
    wanted = select(from_stage, until_stage, force)
    statuses = asked_for(plan(settings, runtime), wanted, force)
    if dry_run or all(status.state == "cached" for status in statuses):
        _show_statuses(statuses, as_json)
    else:
        from pipeline.flows import run_pipeline

        with make_screen(_console(as_json)) as screen:
            run_pipeline(preset, ablation, overrides, stages=wanted, force=force, observer=screen)
    if not dry_run:
        _show_report(settings, runtime, wanted)


@app.command()
def stage(
    name: StageName,
    preset: Preset = None,
    ablation: Ablation = None,
    force: Annotated[bool, typer.Option("--force", help="Make it again though it is cached.")] = False,
    overrides: Overrides = [],
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run one stage here, without Prefect. What it reads must be cached."""
    settings, runtime = load_settings(preset, ablation, overrides)
    statuses = asked_for(plan(settings, runtime), [known_stage(name)], [name] if force else [])
    if dry_run:
        _show_statuses(statuses, as_json)
        return
    with make_screen(_console(as_json)) as screen:
        run_stage(STAGES[name], settings, runtime, force=force, observer=screen)
    _show_report(settings, runtime, [name])


@app.command()
def up(overrides: Overrides = []) -> None:
    """Start Prefect and MLflow on this machine, and serve the pipeline to Prefect's page."""
    from pipeline import servers

    _, runtime = load_settings(overrides=overrides)
    addresses = servers.up(runtime)
    print(f"Prefect  {addresses.prefect}\nMLflow   {addresses.mlflow}\nstop them with `dpar down`")


@app.command()
def down(overrides: Overrides = []) -> None:
    """Stop what `dpar up` started."""
    from pipeline import servers

    _, runtime = load_settings(overrides=overrides)
    servers.down(runtime)


@app.command()
def status(
    preset: Preset = None, ablation: Ablation = None, overrides: Overrides = [], as_json: AsJson = False
) -> None:
    """Show which stages are cached, stale or missing, and why."""
    settings, runtime = load_settings(preset, ablation, overrides)
    _show_statuses(plan(settings, runtime), as_json)


@app.command()
def why(
    name: StageName,
    preset: Preset = None,
    ablation: Ablation = None,
    overrides: Overrides = [],
    as_json: AsJson = False,
) -> None:
    """Show every change that makes a stage stale."""


@app.command()
def config(
    preset: Preset = None, ablation: Ablation = None, overrides: Overrides = [], as_json: AsJson = False
) -> None:
    """Print the resolved settings; as YAML they are a preset."""
    settings, runtime = load_settings(preset, ablation, overrides)
    tree = settings.model_dump(mode="json") | {"runtime": runtime.model_dump(mode="json")}
    print(json.dumps(tree, indent=2) if as_json else yaml.safe_dump(tree, sort_keys=False).rstrip())


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List presets and ablations, and what each is for."""
    found = {kind: {name: describe(kind, name) for name in names(kind)} for kind in ("preset", "ablation")}
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for kind, described in found.items():
        for name, purpose in described.items():
            print(f"--{kind} {name:<20} {purpose}")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="demo: what its models learned; cli: waiting times.")],
    preset: Preset = "demo",
    overrides: Overrides = [],
    as_json: AsJson = False,
) -> None:
    """Check measured numbers against their bounds; exit code 1 when one is missed."""
