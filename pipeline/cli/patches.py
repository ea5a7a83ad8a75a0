"""The command `dpar patches`: what a patch index did to real images."""

from __future__ import annotations

from dataclasses import asdict

import typer

from pipeline.cli import display
from pipeline.cli.options import Ablation, AsJson, Overrides, Preset, load, show_json
from pipeline.plan import require_cached
from stages.images.sources import image_root

app = typer.Typer(rich_markup_mode=None)
READS = ("dataset", "tokenize", "entropy_map", "patch_index")
WORDS = {
    "images": "images looked at, first view",
    "mean_length": "tokens a patch",
    "share_at_limit": "patches of the greatest length, of all",
    "share_by_row": "patches opened at the beginning of a row, by no uncertain token, of all",
    "png_correlation": "correlation of patches with the size as PNG (the paper, on ImageNet: 0.54)",
}


@app.command()
def patches(*, preset: Preset = None, ablation: Ablation = None, overrides: Overrides, as_json: AsJson = False) -> None:
    """Show how images were cut into patches, in numbers and pictures."""
    settings, runtime = load(preset, ablation, overrides)
    inputs = require_cached(settings, runtime, READS, "dpar run --until patch_index")
    from stages.views.patch_report import patch_report

    output = runtime.home / "reports" / inputs["patch_index"].name
    with display.make_console(stderr=True).status("looking at images"):
        numbers = asdict(patch_report(inputs | {"images": image_root(settings.dataset)}, output))
    if as_json:
        show_json({"output": str(output), **numbers})
        return
    for name, value in numbers.items():
        if value is not None:
            typer.echo(f"{display.number(value):>8}  {WORDS[name]}")
    typer.echo(f"pictures in {output}")
