"""Commands of `dpar` that run stages, and that show which stages would run and why."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
import yaml

from conf.load import describe, names
from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline import views as drawn_views
from pipeline.budget.enough import require_enough
from pipeline.cache.external import trusted_since
from pipeline.cache.home import require_writable
from pipeline.cli import display
from pipeline.cli.options import (
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
from pipeline.graph import STAGES
from pipeline.plan import StageStatus, cached_paths, explain, plan
from pipeline.report import collect, numbers
from pipeline.runner import run_stage
from pipeline.selection import as_options, known_stage, select, selected_statuses

app = typer.Typer(rich_markup_mode=None)


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
    """Run all stages that are not cached, and show the scores."""
    settings, runtime = load(preset, ablation, overrides)
    given = as_options(preset, ablation, overrides)
    wanted = select(settings, from_stage, until_stage, force)
    planned = plan(settings, runtime, deep=True)
    statuses = selected_statuses(planned, wanted, settings, force=force, given=given)
    if dry_run:
        _show_statuses(statuses, as_json)
        return
    if any(status.state != "cached" for status in statuses):
        require_writable(runtime.home)
        _warn(settings, runtime, preset, [status.stage for status in statuses if status.state != "cached"])
        from pipeline.serving.local import run_pipeline

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
        statuses = selected_statuses(plan(settings, runtime), wanted, settings)
    else:
        if not as_json:
            _show_statuses(statuses, as_json)
        _draw_stale(wanted, settings, runtime, cached_paths(planned))
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
    """Run one stage in this process, without Prefect. Its inputs must be cached."""
    known_stage(name)
    settings, runtime = load(preset, ablation, overrides)
    given = as_options(preset, ablation, overrides)
    planned = plan(settings, runtime, deep=True)
    statuses = selected_statuses(planned, [name], settings, force=[name] if force else [], given=given)
    if dry_run:
        _show_statuses(statuses, as_json)
        return
    if force or any(status.state != "cached" for status in statuses):
        require_writable(runtime.home)
    require_enough(settings, [name], cached_paths(planned).get("dataset"))
    _warn(settings, runtime, preset, [status.stage for status in statuses if status.state != "cached"])
    with display.make_screen(display.make_console(stderr=as_json)) as screen:
        run_stage(STAGES[name], settings, runtime, force=force, observer=screen)
    _show_report(selected_statuses(plan(settings, runtime), [name], settings), runtime, as_json)


@app.command()
def status(
    *,
    preset: Preset = None,
    ablation: Ablation = None,
    overrides: Overrides,
    deep: Annotated[bool, typer.Option("--deep", help="Check every image file, as a run does.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show which stages are cached, stale or missing, and why."""
    settings, runtime = load(preset, ablation, overrides)
    since = None if deep else trusted_since(settings, runtime.home)
    unchanged_since = None if since is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
    wanted = select(settings)
    statuses = [status for status in plan(settings, runtime, deep=deep) if status.stage in wanted]
    if as_json:
        show_json({"stages": [asdict(each) for each in statuses], "folders_unchanged_since": unchanged_since})
        return
    _show_statuses(statuses, as_json)
    if unread := [name for name in STAGES if name not in wanted]:
        typer.echo(f"not used with these settings: {', '.join(unread)}")
    if unchanged_since is not None:
        typer.echo(f"image folders unchanged since {unchanged_since}: files not checked; --deep checks them")


@app.command()
def views(
    name: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="Default: all stages.")] = None,
    *,
    preset: Preset = None,
    ablation: Ablation = None,
    overrides: Overrides,
    as_json: AsJson = False,
) -> None:
    """Draw the pictures and numbers of cached artifacts again.

    No stage runs.
    """
    settings, runtime = load(preset, ablation, overrides)
    require_writable(runtime.home)
    wanted = select(settings) if name is None else [known_stage(name)]
    paths = cached_paths(plan(settings, runtime))
    with display.make_console(stderr=True).status("drawing"):
        drawn = drawn_views.draw_all(wanted, settings, runtime, paths, force=True)
    if as_json:
        show_json({"views": {name: {"path": str(paths[name] / "views"), "error": drawn[name]} for name in drawn}})
    else:
        for name, error in drawn.items():
            typer.echo(error or f"{name:<13} {paths[name] / drawn_views.VIEWS}")
        if not drawn:
            typer.echo("no view to draw: no stage is cached with these settings")
    if any(drawn.values()):
        raise typer.Exit(1)


@app.command()
def why(
    name: StageName,
    *,
    preset: Preset = None,
    ablation: Ablation = None,
    overrides: Overrides,
    as_json: AsJson = False,
) -> None:
    """Show all changes that make a stage run again."""
    changes = explain(STAGES[known_stage(name)], *load(preset, ablation, overrides))
    if as_json:
        show_json({"stage": name, "changes": changes})
    else:
        typer.echo("\n".join(changes) if changes else f"{name} is cached: nothing has changed")


@app.command()
def config(*, preset: Preset = None, ablation: Ablation = None, overrides: Overrides, as_json: AsJson = False) -> None:
    """Print the resolved settings."""
    settings, runtime = load(preset, ablation, overrides)
    tree = {**settings.model_dump(mode="json"), "runtime": runtime.model_dump(mode="json")}
    if as_json:
        show_json(tree)
    else:
        typer.echo(yaml.safe_dump(tree, sort_keys=False), nl=False)


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List presets and ablations with their descriptions."""
    found = {kind: {name: describe(kind, name) for name in names(kind)} for kind in ("preset", "ablation")}
    if as_json:
        show_json(found)
        return
    for kind, described in found.items():
        for name, purpose in described.items():
            typer.echo(f"--{kind} {name:<18} {purpose}")


def _warn(settings: Settings, runtime: RuntimeConfig, preset: str | None, stages: Sequence[str]) -> None:
    """Warn of what will be slow or will not fit, one line each, before the stages start."""
    from pipeline.budget.advice import advice

    for line in advice(settings, runtime, preset, stages):
        typer.echo(f"warning: {line}", err=True)


def _draw_stale(wanted: list[str], settings: Settings, runtime: RuntimeConfig, artifacts: Mapping[str, Path]) -> None:
    """Draw views that are not current, e.g. after a change of view code alone."""
    for error in drawn_views.draw_all(wanted, settings, runtime, artifacts, force=False).values():
        if error is not None:
            typer.echo(f"dpar: {error}", err=True)


def _show_statuses(statuses: Sequence[StageStatus], as_json: bool) -> None:
    if as_json:
        show_json({"stages": [asdict(status) for status in statuses]})
    else:
        display.make_console().print(display.status_table(statuses))


def _show_report(statuses: Sequence[StageStatus], runtime: RuntimeConfig, as_json: bool) -> None:
    report = collect(cached_paths(statuses))
    if as_json:
        show_json({"stages": [asdict(status) for status in statuses], "scores": numbers(report)})
    else:
        display.print_report(display.make_console(), report, runtime.home)
