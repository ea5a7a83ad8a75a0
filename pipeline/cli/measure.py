"""The commands `dpar bench` and `dpar flops`: gates against bounds, MACs against the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.bench import gates
from pipeline.bench import macs as costs
from pipeline.cli import display, tables
from pipeline.cli.options import AsJson, Overrides, load, show_json
from pipeline.plan import require_cached
from pipeline.report import collect, numbers
from pipeline.selection import select
from stages.runtime.errors import InputError

app = typer.Typer(rich_markup_mode=None)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(gates.NAMES)}.")],
    *,
    overrides: Overrides,
    as_json: AsJson = False,
) -> None:
    """Compare measured numbers with their bounds.

    demo: scores of the finished demo. cli: run time of dpar commands. plan: planned times of the finished demo beside
    measured ones. The others run scripts in tests/benchmarks, which
    take minutes. Exit code 1 if a bound is missed.
    """
    figures: gates.Figures = {}
    if name in gates.SCRIPTS:
        measured, figures = gates.run_scripts(name)
    elif name == "cli":
        _demo_artifacts(overrides)
        measured = gates.cli_gates(overrides)
    elif name == "demo":
        measured = gates.demo_gates(numbers(collect(_demo_artifacts(overrides))))
    elif name == "plan":
        measured, figures = _planned_times(overrides)
    else:
        raise InputError(f"benchmark is {name!r}, expected one of {', '.join(gates.NAMES)}")
    if as_json:
        show_json({"gates": [asdict(gate) for gate in measured], "figures": figures})
    else:
        tables.print_bench(display.make_console(), measured, figures)
    if not all(gate.met for gate in measured):
        raise typer.Exit(1)


def _demo_artifacts(overrides: Sequence[str]) -> dict[str, Path]:
    """Artifacts of the finished demo, by stage."""
    settings, runtime = load("demo", overrides=overrides)
    return require_cached(settings, runtime, select(settings), "dpar run --preset demo")


def _planned_times(overrides: Sequence[str]) -> tuple[list[gates.Gate], gates.Figures]:
    """Gates on planned times of the demo's stages, and the times."""
    from pipeline.budget.cards import measure_cpu
    from pipeline.budget.check import check, plan_gates

    _demo_artifacts(overrides)
    settings, runtime = load("demo", overrides=overrides)
    return plan_gates(check(settings, runtime, measure_cpu()))


@app.command()
def flops(
    *,
    models: Annotated[
        list[str],
        typer.Option(
            "--model",
            metavar="NAME",
            help="Model, e.g. dpar-L, llamagen-L or npp-L; repeatable.",
            default_factory=list,
            show_default=False,
        ),
    ],
    image_sizes: Annotated[
        list[int],
        typer.Option(
            "--image-size",
            metavar="PIXELS",
            help="Image size, e.g. 256; repeatable.",
            default_factory=list,
            show_default=False,
        ),
    ],
    mean_length: Annotated[
        float | None, typer.Option(metavar="TOKENS", help="Mean patch length; default: the paper's for the image size.")
    ] = None,
    entropy_model: Annotated[str, typer.Option(metavar="SIZE", help="Size of the entropy model, B or T.")] = "B",
    as_json: AsJson = False,
) -> None:
    """Count MACs per image, in training and sampling.

    MACs are multiply-accumulates. The default is the models and image sizes of the paper, shown with its numbers.
    """
    with display.make_console(stderr=True).status("counting MACs"):
        rows = costs.measure(models, image_sizes, mean_length, entropy_model)
    if as_json:
        show_json({"entropy_model": entropy_model, "rows": [costs.as_json(row) for row in rows]})
    else:
        tables.print_costs(display.make_console(), rows, entropy_model)
