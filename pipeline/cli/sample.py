"""The commands `dpar sample` and `dpar export`: a preview of a model, and finished samples for other programs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from conf.places import expanded
from pipeline.cli import display
from pipeline.cli.options import Ablation, AsJson, Overrides, Preset, load, show_json
from pipeline.graph import STAGES, inputs_read
from pipeline.plan import require_cached
from stages.runtime.errors import InputError

app = typer.Typer(rich_markup_mode=None)
MAX_IMAGES = 1024  # images in one picture


@app.command()
def sample(
    *,
    preset: Preset = None,
    ablation: Ablation = None,
    overrides: Overrides,
    classes: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Class names or numbers; default: all.")
    ] = None,
    count: Annotated[int, typer.Option("--n", min=1, max=MAX_IMAGES, help="Number of images to sample.")] = 16,
    seed: Annotated[str | None, typer.Option(metavar="SEED", help="Same as sample.seed.")] = None,
    cfg_scale: Annotated[str | None, typer.Option(metavar="SCALE", help="Same as sample.cfg_scale.")] = None,
    boundaries: Annotated[str | None, typer.Option(metavar="SOURCE", help="Same as sample.boundaries.")] = None,
    patches: Annotated[bool, typer.Option("--patches", help="Outline the patches.")] = False,
    init: Annotated[Path | None, typer.Option(parser=expanded, metavar="IMAGE", help="Image to continue.")] = None,
    keep_rows: Annotated[
        int | None, typer.Option(metavar="K", help="Token rows of that image to keep; default: half.")
    ] = None,
    out: Annotated[Path, typer.Option(parser=expanded, metavar="PNG", help="Where to write the picture.")] = Path(
        "samples.png"
    ),
    as_json: AsJson = False,
) -> None:
    """Sample a few images, or continue a real image.

    The inputs of stage sample must be cached. Only the picture is written.
    """
    if keep_rows is not None and init is None:
        raise InputError("--keep-rows is set without --init, expected both: add --init IMAGE, the image to continue")
    if out.suffix.lower() != ".png":
        raise InputError(f"--out is {out}, expected the name of a PNG file, e.g. samples.png")
    given = {"seed": seed, "cfg_scale": cfg_scale, "boundaries": boundaries}
    given_settings = [f"sample.{name}={value}" for name, value in given.items() if value is not None]
    settings, runtime = load(preset, ablation, [*overrides, *given_settings])
    read = {"dataset", *inputs_read(STAGES["sample"], settings)}
    inputs = require_cached(settings, runtime, read, "dpar run --until sample")
    from stages.sampling.preview import Prefix, Request, continue_image, preview

    words = [word.strip() for word in classes.split(",")] if classes else []
    request = Request(classes=words, count=count, patches=patches, output=out)
    with _progress("sample") as on_progress:
        if init is None:
            found = preview(settings.sample, inputs, runtime, request, on_progress)
        else:
            prefix = Prefix(image=init, keep_rows=keep_rows)
            found = continue_image(settings.sample, inputs, runtime, request, prefix, on_progress)
    if as_json:
        show_json({"output": str(out), **asdict(found)})
        return
    typer.echo(f"{display.number(found.seconds_per_image):>8}  seconds per image, on {found.device}")
    typer.echo(f"{display.number(found.mean_patch_length):>8}  tokens per patch")
    typer.echo(f"picture in {out}")


@app.command()
def export(
    *,
    preset: Preset = None,
    ablation: Ablation = None,
    overrides: Overrides,
    npz: Annotated[
        Path | None,
        typer.Option(parser=expanded, metavar="PATH", help="Write one array arr_0, the format of ADM's evaluator."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(parser=expanded, metavar="FOLDER", help="Write one PNG per image into a new folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write finished samples as files for other programs."""
    if npz is None and png is None:
        raise InputError("nothing to export to: give --npz PATH, --png FOLDER or both")
    settings, runtime = load(preset, ablation, overrides)
    artifact = require_cached(settings, runtime, ["sample"], "dpar run --until sample")["sample"]
    from stages.sampling.export import export_npz, export_png
    from stages.stores.samples import SampleStore

    store = SampleStore.of({"sample": artifact})
    with _progress("export") as on_progress:
        if npz is not None:
            export_npz(store, npz, on_progress)
        if png is not None:
            export_png(store, png, on_progress)
    places = {"npz": npz, "png": png}
    if as_json:
        show_json({"samples": str(artifact), "images": len(store), **places})
        return
    for path in filter(None, places.values()):
        typer.echo(f"{len(store):,} images in {path}")


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show progress in images, in the format of a stage."""
    began = time.monotonic()
    with display.make_screen(display.make_console(stderr=True)) as screen:

        def show(done: int, total: int) -> None:
            rate = done / max(time.monotonic() - began, 1e-9)
            screen.stage_progress(
                name, {"what": "images", "done": done, "total": total, "per_second": rate, "note": ""}
            )

        yield show
