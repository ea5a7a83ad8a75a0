"""Tables of `dpar bench` and `dpar flops`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conf.boundary_sources import BOUNDARY_SOURCES
from pipeline.bench.boundary_costs import BOUNDARY_COSTS
from pipeline.bench.family_costs import FAMILY_COSTS
from pipeline.bench.gates import Gate
from pipeline.bench.macs import CostRow, sampling_costs
from pipeline.cli.display import number, plain_table

# Wrapped by hand at 80 columns, the width of the tables: a pipe has no width to wrap at.
TRAINING_NOTE = """\
linear, attn: MACs of one forward; attn includes masked entries. train: linear
and attn, forward and backward. paper: the paper's number for linear; diff: our
difference from it. saved: linear MACs saved against LlamaGen. Training reads
stored entropies; computing them once is not counted."""
SAMPLING_NOTE = """\
Every position is computed once, with guidance (CFG) twice. saved: linear MACs
with CFG saved against LlamaGen. calls: layers called for an image, each of
which reads its weights once for a full batch. MACs set the time of large
batches, calls that of small ones; dpar bench sample measures seconds."""
BOUNDARIES_NOTE = """\
In DPAR, guidance runs only the global stack, the decoder and the head twice.
DPAR has one row for each boundary source, all at the same mean patch length."""
EXTRAPOLATED_NOTE = """\
~ The paper has no mean length for this image size. It is extrapolated from 1.81
at 256 px and 2.06 at 384 px."""


def print_bench(console: Console, gates: Sequence[Gate], figures: Mapping[str, Mapping[str, float]]) -> None:
    """Print the measured figures, then the gates."""
    if figures:
        console.print(figure_table(figures))
        console.print()
    console.print(gate_table(gates))


def gate_table(gates: Iterable[Gate]) -> Table:
    """Gates with value, bound and verdict."""
    table = plain_table("gate", "value", "bound", "")
    for gate in gates:
        verdict = Text("met", style="green") if gate.met else Text("MISSED", style="bold red")
        table.add_row(gate.name, number(gate.value), number(gate.bound), verdict)
    return table


def figure_table(figures: Mapping[str, Mapping[str, float]]) -> Table:
    """Figures by column and row; missing cells are empty."""
    table = plain_table("", *figures, numbers=figures)
    for row in dict.fromkeys(row for column in figures.values() for row in column):
        cells = (number(column[row]) if row in column else "" for column in figures.values())
        table.add_row(row, *cells)
    return table


def print_costs(console: Console, rows: Sequence[CostRow], entropy_model: str) -> None:
    """Print the tables of training and sampling MACs, each with notes on its columns."""
    training, sampling = [TRAINING_NOTE], [SAMPLING_NOTE]
    shown = {row.model.partition("-")[0] for row in rows}
    training += [cost.note for family, cost in FAMILY_COSTS.items() if family in shown and cost.note is not None]
    if any(row.patches is not None and row.patches.length_source == "extrapolated" for row in rows):
        training.append(EXTRAPOLATED_NOTE)
    if any(row.patches is not None for row in rows):
        sampling += [BOUNDARIES_NOTE, *_source_notes()]
    console.print(Text("Training, GMACs per image", style="bold"))
    console.print(training_table(rows))
    console.print(Text("\n".join(training), style="dim"))
    console.print(Text("\nSampling with caches, GMACs per image", style="bold"))
    console.print(sampling_table(rows, entropy_model))
    console.print(Text("\n".join(sampling), style="dim"))


def training_table(rows: Iterable[CostRow]) -> Table:
    """One row per model and image size."""
    numbers = ("px", "length", "params", "linear", "attn", "train", "paper", "diff", "saved")
    table = plain_table("model", *numbers, numbers=numbers)
    for row in rows:
        forward, training = row.cost.forward, row.cost.training
        table.add_row(
            row.model,
            str(row.image_size),
            _length(row),
            f"{row.cost.parameters / 1e6:,.0f}M",
            _giga(forward.linear),
            _giga(forward.attention),
            _giga(training.total),
            "-" if row.paper_gmacs is None else f"{row.paper_gmacs:.2f}",
            "-" if row.paper_difference_percent is None else f"{row.paper_difference_percent:+.2f}%",
            _percent(row.saved_percent),
        )
    return table


def sampling_table(rows: Iterable[CostRow], entropy_model: str) -> Table:
    """One row per model and image size; a model on patches has one row per boundary source."""
    numbers = ("px", "linear", "attn", "CFG linear", "CFG attn", "saved", "calls")
    table = plain_table("model", *numbers, numbers=numbers)
    for row in rows:
        for cost in sampling_costs(row):
            table.add_row(
                _sampled(row, cost.boundaries, entropy_model),
                str(row.image_size),
                _giga(cost.plain.linear),
                _giga(cost.plain.attention),
                _giga(cost.guided.linear),
                _giga(cost.guided.attention),
                _percent(cost.saved_percent),
                f"{cost.layer_calls:,.0f}",
            )
    return table


def _sampled(row: CostRow, source: str | None, entropy_model: str) -> str:
    """First cell of a sampling row: the model, in its first row only, and the boundary source."""
    if source is None or row.patches is None:
        return row.model
    first = source == next(iter(row.patches.boundaries))
    size = f" {entropy_model}" if "entropy_model" in BOUNDARY_SOURCES[source].reads else ""
    return f"{row.model if first else ' '} {BOUNDARY_SOURCES[source].label}{size}"


def _source_notes() -> list[str]:
    """One note for each boundary source, wrapped at 80 columns."""
    return [
        fill(f"{BOUNDARY_SOURCES[source].label}: {BOUNDARY_SOURCES[source].meaning}.", 80) for source in BOUNDARY_COSTS
    ]


def _length(row: CostRow) -> str:
    if row.patches is None:
        return "-"
    mark = "~" if row.patches.length_source == "extrapolated" else ""
    return f"{mark}{row.patches.mean_length:.2f}"


def _giga(macs: float) -> str:
    giga = macs / 1e9
    return f"{giga:.2f}" if giga < 1000 else f"{giga:,.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1f}%"
