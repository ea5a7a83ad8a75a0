"""The command `dpar patches`: statistics and pictures of the patches of real images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from conf.places import expanded
from pipeline.cache.home import require_writable
from pipeline.cli import display
from pipeline.cli.options import Ablation, AsJson, Overrides, Preset, load, show_json
from pipeline.graph import STAGES, inputs_read
from pipeline.plan import require_cached
from stages.images.sources import image_root

app = typer.Typer(rich_markup_mode=None)
INPUTS = ("dataset", "tokenize", "patch_index")
LABELS = {
    "images": "images (first view of each)",
    "mean_length": "tokens per patch",
    "share_at_limit": "share of patches with the maximum length",
    "share_by_row": "share of patches opened by a row boundary, not by an uncertain token",
    "png_correlation": "correlation of patches per image and PNG size (paper, ImageNet: 0.54)",
    "entropy_correlation": "correlation of the entropies and the compared ones (paper, other models: 0.85 to 0.88)",
}


@app.command()
def patches(
    *,
    preset: Preset = None,
    ablation: Ablation = None,
    overrides: Overrides,
    compare: Annotated[
        Path | None,
        typer.Option(
            parser=expanded,
            metavar="FOLDER",
            help="Another entropy_map artifact of the same tokens, to correlate with.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show statistics and pictures of the patches of real images."""
    settings, runtime = load(preset, ablation, overrides)
    names = {*INPUTS, *inputs_read(STAGES["patch_index"], settings)}
    inputs = require_cached(settings, runtime, names, "dpar run --until patch_index")
    from stages.views.patch_report import patch_report

    require_writable(runtime.home)
    output = runtime.home / "reports" / inputs["patch_index"].name
    with display.make_console(stderr=True).status("reading images"):
        numbers = asdict(patch_report(inputs | {"images": image_root(settings.dataset)}, output, compare))
    if as_json:
        show_json({"output": str(output), **numbers})
        return
    for name, value in numbers.items():
        if value is not None:
            typer.echo(f"{display.number(value):>8}  {LABELS[name]}")
    typer.echo(f"pictures in {output}")
