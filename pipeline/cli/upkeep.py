"""Commands of `dpar` that maintain the cache and the servers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from conf.load import load_settings, names
from pipeline import garbage, upkeep
from pipeline.cache.home import require_writable
from pipeline.cli.options import Ablation, AsJson, Overrides, Preset, StageName, load, show_json
from pipeline.graph import STAGES
from pipeline.selection import known_stage
from pipeline.text import size

app = typer.Typer(rich_markup_mode=None)
mlflow_app = typer.Typer(rich_markup_mode=None, help="Commands for the MLflow store.")
app.add_typer(mlflow_app, name="mlflow")


@app.command()
def verify(
    *,
    deep: Annotated[bool, typer.Option("--deep", help="Check every byte, not only sizes.")] = False,
    overrides: Overrides,
) -> None:
    """Check the files of all artifacts for damage.

    Exit code 1 if an artifact is damaged.
    """
    _, runtime = load(overrides=overrides)
    found = upkeep.verify(runtime, deep=deep)
    damaged = [finding for finding in found if finding.damages]
    for finding in damaged:
        for damage in finding.damages:
            typer.echo(f"damaged  {finding.path}: {damage}")
    typer.echo(f"{len(found)} artifacts checked, {len(damaged)} damaged")
    if damaged:
        typer.echo("`dpar run` makes a damaged artifact again when it is needed")
        raise typer.Exit(1)


@app.command()
def gc(
    *,
    preset: Preset = None,
    ablation: Ablation = None,
    overrides: Overrides,
    older_than: Annotated[int, typer.Option(metavar="DAYS", min=0, help="Keep artifacts younger than this.")] = 30,
    yes: Annotated[bool, typer.Option("--yes", help="Remove the listed folders; default: only list them.")] = False,
    as_json: AsJson = False,
) -> None:
    """List or remove artifacts that are no longer needed.

    Kept are the artifacts of these settings and of all presets, artifacts made, tracked or worked on recently, and
    everything that these were made from.
    """
    settings, runtime = load(preset, ablation, overrides)
    presets = {name: load_settings(name)[0] for name in names("preset")}
    found = garbage.find_garbage(settings, runtime, presets, older_than_s=older_than * garbage.DAY_S)
    removed = garbage.collect(runtime.home, found.garbage) if yes else []
    if as_json:
        left_alone = [{"path": path, "why": what} for path, what in found.left_alone]
        show_json(
            {
                "garbage": [asdict(entry) for entry in found.garbage],
                "removed": [entry.path for entry in removed],
                "left_alone": left_alone,
            }
        )
        return
    for entry in found.garbage:
        about = "; ".join(filter(None, (entry.why, entry.belongs)))
        typer.echo(f"{size(entry.bytes):>9}  {entry.path}  ({about})")
    for path, what in found.left_alone:
        typer.echo(f"left alone {path}: {what}")
    _say_total(found.garbage, removed, yes=yes)


def _say_total(found: list[garbage.Garbage], removed: list[garbage.Garbage], *, yes: bool) -> None:
    if not found:
        typer.echo("nothing to remove")
    elif yes:
        in_use = f", kept {len(found) - len(removed)} in use" if len(removed) < len(found) else ""
        typer.echo(f"removed {size(sum(entry.bytes for entry in removed))}{in_use}")
    else:
        typer.echo(f"{size(sum(entry.bytes for entry in found))} can be removed: dpar gc --yes")


@app.command()
def accept(name: StageName, *, preset: Preset = None, ablation: Ablation = None, overrides: Overrides) -> None:
    """Mark an artifact as valid for the current code.

    The newest artifact with the current settings and inputs is accepted. Only code and package versions may differ.
    """
    manifest, ignored = upkeep.accept(STAGES[known_stage(name)], *load(preset, ablation, overrides))
    typer.echo(f"{name} is now cached as {manifest.key}; ignored: {'; '.join(ignored)}")


@app.command()
def up(
    *,
    overrides: Overrides,
    open_pages: Annotated[bool, typer.Option("--open", help="Open both pages in a browser, logged in.")] = False,
) -> None:
    """Start Prefect and MLflow on this machine.

    Runs can then also be started from Prefect's page. Both pages ask for the login that is printed.
    """
    from pipeline import servers

    _, runtime = load(overrides=overrides)
    require_writable(runtime.home)
    typer.echo("starting the servers; this can take a minute", err=True)
    addresses = servers.up(runtime)
    typer.echo(f"Prefect  {addresses.prefect}\nMLflow   {addresses.mlflow}")
    auth = servers.read_auth(runtime) or ""
    user, _, password = auth.partition(":")
    typer.echo(f"log in   Prefect: {auth}\n         MLflow: user {user}, password {password}")
    typer.echo("stop them with `dpar down`")
    if open_pages and not servers.open_pages(runtime, addresses):
        typer.echo("there is no browser here: open the pages yourself", err=True)


@app.command()
def down(*, overrides: Overrides) -> None:
    """Stop the servers that `dpar up` started."""
    from pipeline import servers

    _, runtime = load(overrides=overrides)
    servers.down(runtime)
    typer.echo("Prefect and MLflow are stopped")


@mlflow_app.command()
def sync(*, overrides: Overrides) -> None:
    """Send MLflow the events it missed while it was down."""
    from pipeline.tracking import tracker as tracking

    _, runtime = load(overrides=overrides)
    typer.echo(f"runs sent: {tracking.sync(runtime)}")
