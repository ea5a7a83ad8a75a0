"""Commands of `dpar` that measure: the demo against its bounds, models against the paper."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pipeline import bench as gates
from pipeline import display, tables
from pipeline import flops as costs
from pipeline.options import AsJson, Overrides, load, show_json
from pipeline.plan import cached_paths, plan
from pipeline.report import read_metrics
from stages.errors import InputError

app = typer.Typer(rich_markup_mode=None)


@app.command()
def bench(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="demo: what its models learned; cli: how long one waits.")
    ],
    *,
    overrides: Overrides,
    as_json: AsJson = False,
) -> None:
    """Hold numbers of the demo against their bounds.

    Exit code 1 when one is missed.
    """
    if name not in ("demo", "cli"):
        raise InputError(f"benchmark is {name!r}, expected demo or cli")
    statuses = plan(*load("demo", overrides=overrides))
    missing = [status.stage for status in statuses if status.state != "cached"]
    if missing:
        raise InputError(f"not cached: {', '.join(missing)}: make them with `dpar run --preset demo`")
    measured = (
        gates.cli_gates(overrides)
        if name == "cli"
        else gates.demo_gates(read_metrics(cached_paths(statuses)["evaluate"]))
    )
    if as_json:
        show_json({"gates": [asdict(gate) for gate in measured]})
    else:
        display.make_console().print(display.gate_table(measured))
    if not all(gate.met for gate in measured):
        raise typer.Exit(1)


@app.command()
def flops(
    *,
    models: Annotated[
        list[str],
        typer.Option(
            "--model",
            metavar="NAME",
            help="As dpar-L; can be given again.",
            default_factory=list,
            show_default=False,
        ),
    ],
    image_sizes: Annotated[
        list[int],
        typer.Option(
            "--image-size",
            metavar="PIXELS",
            help="As 256; can be given again.",
            default_factory=list,
            show_default=False,
        ),
    ],
    mean_length: Annotated[
        float | None, typer.Option(metavar="TOKENS", help="Mean patch length; else the paper's for the image size.")
    ] = None,
    entropy_model: Annotated[str, typer.Option(metavar="SIZE", help="Size of the entropy model, B or T.")] = "B",
    as_json: AsJson = False,
) -> None:
    """Count what an image costs, in training and sampling.

    By default for the models and image sizes of the paper, beside its numbers.
    """
    with display.make_console(stderr=True).status("counting"):
        rows = costs.measure(models, image_sizes, mean_length, entropy_model)
    if as_json:
        show_json({"entropy_model": entropy_model, "rows": [costs.as_json(row) for row in rows]})
    else:
        tables.print_costs(display.make_console(), rows, entropy_model)
