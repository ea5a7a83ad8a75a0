"""Tables of `dpar plan`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.budget.budget import Budget, StageBudget, usable_memory
from pipeline.cli.display import plain_table
from pipeline.text import duration, size

_LIMITS = {
    "products": "matrix products or convolutions",
    "launches": "operations that the host starts one by one",
    "bandwidth": "reading weights and caches from memory",
    "host": "the host's cores: reading, decoding and cropping images",
    "start": "starting processes and importing torch",
}


def print_budget(console: Console, budget: Budget, found: Sequence[str]) -> None:
    """Print what the plan assumes, the stages, the memory of trainings by micro-batch, and warnings."""
    for line in assumptions(budget):
        console.print(line)
    console.print()
    console.print(stage_table(budget))
    shown = dict.fromkeys(stage.time.name for stage in budget.stages)
    console.print(Text("limit: " + "; ".join(f"{name}, {_LIMITS[name]}" for name in shown), style="dim"))
    if budget.trainings:
        console.print(Text("\nMemory on each device by images of a micro-batch", style="bold"))
        console.print(memory_table(budget))
        console.print(Text("largest: micro-batch that fits; smaller ones accumulate gradients", style="dim"))
    console.print()
    for line in found:
        console.print(Text.assemble(("warning ", "bold yellow"), line))
    if not found:
        console.print(Text(f"everything fits on {_devices(budget)}", style="green"))


def assumptions(budget: Budget) -> Iterator[str]:
    """Lines that say what the numbers rest on."""
    shape, card, efficiency = budget.shape, budget.card, budget.efficiency
    heldout = f", {shape.heldout:,} held out" if shape.heldout else ""
    yield f"images   {shape.images:,} in {shape.views} views ({shape.origin}{heldout})"
    yield (
        f"tokens   {shape.tokens.num_tokens} an image, {shape.tokens.codebook_size:,} codes; "
        f"{shape.mean_length:.2f} a patch ({shape.length_origin})"
    )
    origin = "measured" if card.is_cpu else "data sheet"
    yield (
        f"device   {_devices(budget)}: {size(card.memory)}, {_rate(card.bfloat16)} bfloat16, {_rate(card.float32)} "
        f"float32, {size(card.bandwidth)}/s ({origin}); {card.cores:g} cores{'' if card.is_cpu else ' each, assumed'}"
    )
    origin = "calibrated on the demo" if card.is_cpu else "assumed, not measured"
    training = efficiency.shares["training", "bfloat16"]
    convolutions = dict.fromkeys(efficiency.shares["convolution", name] for name in ("bfloat16", "float32"))
    yield (
        f"share    {training:.0%} of that in training and forward passes, "
        f"{' and '.join(f'{share:.0%}' for share in convolutions)} in convolutions ({origin})"
    )


def stage_table(budget: Budget) -> Table:
    """One row for each stage, and their sum."""
    numbers = ("images", "tokens", "FLOPs", "time", "disk", "device", "host")
    table = plain_table("stage", *numbers, "limit", numbers=numbers)
    for stage in budget.stages:
        table.add_row(
            stage.stage,
            _count(stage.work.images),
            _count(stage.work.tokens),
            _count(stage.flops),
            duration(stage.time.seconds),
            size(stage.disk.kept),
            Text(size(stage.device) if stage.device else "-", style=_fit_style(stage, budget)),
            size(stage.host),
            stage.time.name,
        )
    flops = sum(stage.flops for stage in budget.stages)
    table.add_row("all", "", "", _count(flops), duration(budget.seconds), size(budget.disk), "", "", "")
    return table


def memory_table(budget: Budget) -> Table:
    """Memory of each training at each micro-batch; the sizes that do not fit are red."""
    sizes = sorted({batch for training in budget.trainings.values() for batch in training.micro_batches})
    columns = [str(batch) for batch in sizes]
    table = plain_table("stage", *columns, "share", "largest", numbers=(*columns, "share", "largest"))
    memory = usable_memory(budget.card)
    for name, training in budget.trainings.items():
        cells = []
        for batch in sizes:
            needed = training.at(batch)
            style = "red" if needed > memory else ""
            cells.append(Text(size(needed), style=style) if batch <= training.share else Text("-"))
        table.add_row(name, *cells, str(training.share), str(training.largest(memory) or "none"))
    return table


def as_json(budget: Budget, found: Sequence[str]) -> dict[str, Any]:
    """The budget as JSON: seconds, bytes, floating-point operations."""
    return {
        "card": asdict(budget.card),
        "devices": budget.devices,
        "shape": asdict(budget.shape),
        "efficiency": {" ".join(key): share for key, share in budget.efficiency.shares.items()},
        "stages": [_stage_json(stage) for stage in budget.stages],
        "micro_batches": {
            name: {str(batch): training.at(batch) for batch in training.micro_batches}
            for name, training in budget.trainings.items()
        },
        "seconds": budget.seconds,
        "disk": budget.disk,
        "warnings": list(found),
    }


def _stage_json(stage: StageBudget) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "images": stage.work.images,
        "tokens": stage.work.tokens,
        "flops": stage.flops,
        "seconds": stage.time.seconds,
        "limit": stage.time.name,
        "disk": asdict(stage.disk),
        "device_memory": stage.device,
        "micro_batch": stage.micro_batch,
        "host_memory": stage.host,
    }


def _fit_style(stage: StageBudget, budget: Budget) -> str:
    return "red" if stage.device > usable_memory(budget.card) else ""


def _devices(budget: Budget) -> str:
    return f"{budget.devices} x {budget.card.name}"


def _rate(flops: float) -> str:
    return f"{flops / 1e12:,.0f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:,.0f} GFLOP/s"


def _count(value: float) -> str:
    """A large number with three digits: `1.28M`, `384M`, `1.2e+18`; `-` for none."""
    if not value:
        return "-"
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "G")):
        if value < limit:
            return f"{value / (limit / 1e3):.3g}{unit}"
    return f"{value:.2g}"
