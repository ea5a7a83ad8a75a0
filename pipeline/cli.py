"""The command `dpar`: what a person types to make artifacts, to look at them and to look after them."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
import yaml

from conf.load import describe, names
from conf.schema import RuntimeConfig
from pipeline import display
from pipeline.cli_measure import app as measure_app
from pipeline.cli_patches import app as patches_app
from pipeline.cli_sample import app as sample_app
from pipeline.cli_upkeep import app as upkeep_app
from pipeline.external import trusted_since
from pipeline.failures import describe_failure
from pipeline.graph import STAGES
from pipeline.options import (
    Ablation,
    AsJson,
    DryRun,
    Forced,
    ForcedStages,
    From,
    Overrides,
    Preset,
    StageName,
    Until,
    load,
    show_json,
)
from pipeline.plan import StageStatus, cached_paths, explain, plan
from pipeline.report import collect
from pipeline.runner import run_stage
from pipeline.selection import asked_for, known_stage, select

logger = logging.getLogger("pipeline")
INTERRUPTED = 130

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From a folder of images to a trained, sampled and scored DPAR model. What is unchanged is not made again.",
)
app.add_typer(measure_app)
app.add_typer(patches_app)
app.add_typer(sample_app)
app.add_typer(upkeep_app)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    logger.setLevel(logging.DEBUG if debug else logging.NOTSET)


@app.command()
def run(
    *,
    preset: Preset = None,
    ablation: Ablation = None,
    from_stage: From = None,
    until_stage: Until = None,
    force: ForcedStages,
    overrides: Overrides,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make what is not made yet, and show the scores."""
    settings, runtime = load(preset, ablation, overrides)
    wanted = select(from_stage, until_stage, force)
    statuses = asked_for(plan(settings, runtime, deep=True), wanted, force)
    if dry_run:
        _show_statuses(statuses, as_json)
        return
    if any(status.state != "cached" for status in statuses):
        from pipeline.local import run_pipeline

        with display.make_screen(display.make_console(stderr=as_json)) as screen:
            run_pipeline(
                preset,
                ablation,
                overrides,
                from_stage=from_stage,
                until_stage=until_stage,
                force=force,
                observer=screen,
            )
        statuses = asked_for(plan(settings, runtime), wanted)
    elif not as_json:
        _show_statuses(statuses, as_json)
    _show_report(statuses, runtime, as_json)


@app.command()
def stage(
    name: StageName,
    *,
    preset: Preset = None,
    ablation: Ablation = None,
    force: Forced = False,
    overrides: Overrides,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run one stage here, without Prefect. What it reads must be cached."""
    known_stage(name)
    settings, runtime = load(preset, ablation, overrides)
    statuses = asked_for(plan(settings, runtime, deep=True), [name], [name] if force else [])
    if dry_run:
        _show_statuses(statuses, as_json)
        return
    with display.make_screen(display.make_console(stderr=as_json)) as screen:
        run_stage(STAGES[name], settings, runtime, force=force, observer=screen)
    _show_report(asked_for(plan(settings, runtime), [name]), runtime, as_json)


@app.command()
def status(
    *,
    preset: Preset = None,
    ablation: Ablation = None,
    overrides: Overrides,
    deep: Annotated[bool, typer.Option("--deep", help="Look at every image file, as a run does.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show which stages are cached, stale or missing, and why."""
    settings, runtime = load(preset, ablation, overrides)
    since = None if deep else trusted_since(settings, runtime.home)
    unchanged_since = None if since is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
    statuses = plan(settings, runtime, deep=deep)
    if as_json:
        show_json({"stages": [asdict(each) for each in statuses], "folders_unchanged_since": unchanged_since})
        return
    _show_statuses(statuses, as_json)
    if unchanged_since is not None:
        typer.echo(f"image folders unchanged since {unchanged_since}: files not looked at; --deep looks")


@app.command()
def why(
    name: StageName,
    *,
    preset: Preset = None,
    ablation: Ablation = None,
    overrides: Overrides,
    as_json: AsJson = False,
) -> None:
    """Show every change that makes a stage run again."""
    changes = explain(STAGES[known_stage(name)], *load(preset, ablation, overrides))
    if as_json:
        show_json({"stage": name, "changes": changes})
    else:
        typer.echo("\n".join(changes) if changes else f"{name} is cached: nothing has changed")


@app.command()
def config(*, preset: Preset = None, ablation: Ablation = None, overrides: Overrides, as_json: AsJson = False) -> None:
    """Print all settings as they resolve."""
    settings, runtime = load(preset, ablation, overrides)
    tree = {**settings.model_dump(mode="json"), "runtime": runtime.model_dump(mode="json")}
    if as_json:
        show_json(tree)
    else:
        typer.echo(yaml.safe_dump(tree, sort_keys=False), nl=False)


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List presets and ablations, and what each is for."""
    found = {kind: {name: describe(kind, name) for name in names(kind)} for kind in ("preset", "ablation")}
    if as_json:
        show_json(found)
        return
    for kind, described in found.items():
        for name, purpose in described.items():
            typer.echo(f"--{kind} {name:<18} {purpose}")


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; an error becomes one line on standard error."""
    try:
        code = app(args=list(arguments) or ["--help"], prog_name="dpar", standalone_mode=False)
    except Exception as error:
        if logger.isEnabledFor(logging.DEBUG):
            traceback.print_exception(error)
        failure = describe_failure(error)
        typer.echo(f"dpar: {failure.line}", err=True)
        return failure.code
    if code == INTERRUPTED:  # typer returns it in place of KeyboardInterrupt
        typer.echo("dpar: interrupted; run again to resume", err=True)
    return int(code or 0)


def main() -> None:
    """Entry point of the command `dpar`."""
    sys.exit(run_command(sys.argv[1:]))


def _show_statuses(statuses: Sequence[StageStatus], as_json: bool) -> None:
    if as_json:
        show_json({"stages": [asdict(status) for status in statuses]})
    else:
        display.make_console().print(display.status_table(statuses))


def _show_report(statuses: Sequence[StageStatus], runtime: RuntimeConfig, as_json: bool) -> None:
    report = collect(cached_paths(statuses))
    if as_json:
        scores = {score.name: score.value for score in (*report.ladder, *report.scores)}
        show_json({"stages": [asdict(status) for status in statuses], "scores": scores})
    else:
        display.print_report(display.make_console(), report, runtime.home)


if __name__ == "__main__":
    main()
