"""Commands of `dpar` that look after the cache and the servers."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline import upkeep
from pipeline.cli import display
from pipeline.cli.options import Ablation, Overrides, Preset, StageName, load
from pipeline.graph import STAGES
from pipeline.selection import known_stage

app = typer.Typer(rich_markup_mode=None)
mlflow_app = typer.Typer(rich_markup_mode=None, help="The tracking store.")
app.add_typer(mlflow_app, name="mlflow")


@app.command()
def verify(
    *,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte, not only sizes.")] = False,
    overrides: Overrides,
) -> None:
    """Check the files of every artifact.

    Exit code 1 when one is damaged.
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
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """Remove what nothing needs any more.

    What these settings or the newest artifact of any stage were made from stays.
    """
    found = upkeep.garbage(*load(preset, ablation, overrides))
    for entry in found:
        typer.echo(f"{display.size(entry.bytes):>9}  {entry.path}  ({entry.why})")
    if not found:
        typer.echo("nothing to remove")
    elif yes or typer.confirm(f"remove {display.size(sum(entry.bytes for entry in found))}?"):
        upkeep.collect(found)


@app.command()
def accept(name: StageName, *, preset: Preset = None, ablation: Ablation = None, overrides: Overrides) -> None:
    """Keep a stale artifact as it is.

    The newest one of the stage then stands for the settings and the code of now, as if made from them.
    """
    manifest, ignored = upkeep.accept(STAGES[known_stage(name)], *load(preset, ablation, overrides))
    typer.echo(f"{name} is cached now as {manifest.key}; ignored: {'; '.join(ignored) or 'nothing'}")


@app.command()
def up(*, overrides: Overrides) -> None:
    """Start Prefect and MLflow on this machine.

    The pipeline can then be run from Prefect's page as well.
    """
    from pipeline import servers

    _, runtime = load(overrides=overrides)
    typer.echo("starting, which can take a minute", err=True)
    addresses = servers.up(runtime)
    typer.echo(f"Prefect  {addresses.prefect}\nMLflow   {addresses.mlflow}\nstop them with `dpar down`")


@app.command()
def down(*, overrides: Overrides) -> None:
    """Stop what `dpar up` started."""
    from pipeline import servers

    _, runtime = load(overrides=overrides)
    servers.down(runtime)
    typer.echo("Prefect and MLflow are down")


@mlflow_app.command()
def sync(*, overrides: Overrides) -> None:
    """Send MLflow what it missed while it was down."""
    from pipeline.tracking import tracker as tracking

    _, runtime = load(overrides=overrides)
    typer.echo(f"runs sent: {tracking.sync(runtime)}")
