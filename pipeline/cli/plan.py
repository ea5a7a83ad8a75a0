"""The command `dpar plan`: what a run takes on a card, before it starts."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.budget.cards import NAMES
from pipeline.cli import display
from pipeline.cli.options import Ablation, AsJson, From, Overrides, Preset, Until, load, show_json
from pipeline.selection import select

app = typer.Typer(rich_markup_mode=None)


@app.command()
def plan(
    *,
    preset: Preset = None,
    ablation: Ablation = None,
    from_stage: From = None,
    until_stage: Until = None,
    overrides: Overrides,
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="CARD", help=f"One of {', '.join(NAMES)}; cpu is this machine's.")
    ] = NAMES[0],
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="Number of cards, one process on each.")] = 1,
    mfu: Annotated[
        float | None,
        typer.Option(metavar="SHARE", min=0.01, max=1.0, help="Share of the card's peak that training reaches."),
    ] = None,
    images: Annotated[int | None, typer.Option(metavar="N", min=1, help="Number of images; default: counted.")] = None,
    as_json: AsJson = False,
) -> None:
    """Plan a run: operations, time, disk and memory of every stage, and what does not fit.

    Nothing runs. Times are computed from counted operations and the card's data sheet; no GPU time was ever measured.
    """
    from pipeline.budget.budget import make_budget, warnings
    from pipeline.budget.cards import find_card
    from pipeline.budget.images import count_images
    from pipeline.budget.shape import shape_of
    from pipeline.cli import budget_tables

    settings, runtime = load(preset, ablation, overrides)
    stages = select(settings, from_stage, until_stage)
    shape = shape_of(settings, *count_images(settings, runtime, preset, images))
    with display.make_console(stderr=True).status("counting operations"):
        budget = make_budget(settings, shape, stages, find_card(gpu), devices=gpus, mfu=mfu)
    found = list(warnings(budget, runtime.home))
    if as_json:
        show_json(budget_tables.as_json(budget, found))
    else:
        budget_tables.print_budget(display.make_console(), budget, found)
