"""Where the time of drawing an image goes, model by model, and how it falls as more images are drawn together."""

from __future__ import annotations

import argparse
import sys
import time
from collections import ChainMap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from model_sizes import BOTH, GPTS
from report import report
from sample_speed import against_others
from samplers import (
    DTYPE,
    GRIDS,
    Decoder,
    LlamaGenDecoder,
    OwnClocks,
    Watched,
    dpar,
    entropy_head,
    entropy_model,
    gpt,
    in_all,
    many_starts,
    packed,
    seconds_an_image,
)
from torch import nn

from models.dpar import DPAR


class Stopwatch:
    """Adds up the seconds that modules take."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, name: str, modules: Iterable[nn.Module]) -> None:
        """Count what `modules` take under `name`; none of them lies in another."""
        self.seconds[name] = 0.0
        for module in modules:
            module.register_forward_pre_hook(self._start)
            module.register_forward_hook(lambda *_: self._stop(name))

    def _start(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def _stop(self, name: str) -> None:
        self.seconds[name] += time.perf_counter() - self._since


def watched(model: DPAR) -> Stopwatch:
    """A stopwatch on the parts of a DPAR."""
    watch = Stopwatch()
    watch.watch("encoder", [*model.local_encoder.layers, *model.local_encoder.cross_attn_layers])
    watch.watch("global", model.layers)
    watch.watch("decoder", [*model.local_decoder.layers, *model.local_decoder.cross_attn_layers])
    watch.watch("head", [model.norm, model.output])
    return watch


def parts(size: str, pixels: int, batch: int, entropy_models: Sequence[str]) -> dict[str, float]:
    """Seconds an image of DPAR by part, and of LlamaGen as a whole beside it, in turns."""
    grid = GRIDS[pixels]
    model, starts = packed(dpar(size, grid)), many_starts(batch, grid)
    watch = watched(model)
    models = {f"entropy model {name}": entropy_model(name, grid) for name in entropy_models}
    sources = Watched(starts, {"entropy head": entropy_head(model), **models})
    decoders: dict[str, Decoder] = {
        "whole": OwnClocks(model, sources, batch, ChainMap(sources.seconds, watch.seconds)),
        "LlamaGen": LlamaGenDecoder(packed(gpt(size, grid)), batch),
    }
    spent = seconds_an_image(decoders, grid.num_tokens)
    whole, llamagen = spent.pop("whole"), spent.pop("LlamaGen")
    sums = in_all(whole, {name: spent[name] for name in sources.seconds})
    rest = {"the rest": whole - sum(spent.values())}
    return spent | rest | {f"in all, {name}": seconds for name, seconds in sums.items()} | {"LlamaGen": llamagen}


def by_batch(size: str, batches: Sequence[int], entropies: str) -> dict[str, dict[str, float]]:
    """Seconds an image of LlamaGen and DPAR at each batch."""
    found: dict[str, dict[str, float]] = {}
    for batch in batches:
        for name, seconds in against_others(size, batch, [entropies]).items():
            whose = f"LlamaGen-{size}" if name == "LlamaGen" else f"DPAR-{size}, {name}"
            found.setdefault(whose, {})[f"batch {batch}"] = seconds
    return found


def draw_curve(found: dict[str, dict[str, float]], batches: Sequence[int], path: Path) -> None:
    """Write a PNG of seconds an image over the images drawn together."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, column in found.items():
        axes.plot(batches, list(column.values()), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis("{x:g}")
    axes.set(
        xlabel="images that take a step together",
        ylabel="seconds an image",
        title=f"Sampling at 256 px, guided, {str(DTYPE).removeprefix('torch.')}",
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


@torch.inference_mode()
def main() -> None:
    """Measure and print what was found; no gates."""
    parser = argparse.ArgumentParser(description="Where the time of drawing an image goes.")
    parser.add_argument("--sizes", nargs="+", choices=BOTH, default=["B", "L", "XL"], help="Split by part.")
    parser.add_argument("--pixels", nargs="+", type=int, choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--batch", type=int, default=16, help="Of what is split by part.")
    parser.add_argument("--curve-size", choices=BOTH, default="B")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64], help="Of the curve.")
    parser.add_argument(
        "--entropy-models", nargs="+", choices=GPTS, default=["B", "T"], help="The curve has the first alone."
    )
    parser.add_argument("--curve", type=Path, default=Path("artifacts/bench/sampling.png"), metavar="PNG")
    options = parser.parse_args()
    columns = by_batch(options.curve_size, options.batches, options.entropy_models[0])
    draw_curve(columns, options.batches, options.curve)
    print(f"curve in {options.curve}", file=sys.stderr)
    for size in options.sizes:
        for pixels in options.pixels:
            column = parts(size, pixels, options.batch, options.entropy_models)
            columns[f"DPAR-{size}, {pixels} px, batch {options.batch}"] = column
    report([], {f"{name}, s an image": column for name, column in columns.items()})


if __name__ == "__main__":
    main()
