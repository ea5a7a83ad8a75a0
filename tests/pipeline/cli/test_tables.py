"""Tables of costs and gates: they fit 80 columns, and mark extrapolated lengths and missed gates."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from models.macs import Cost, Macs, Sampling
from pipeline.bench.family_costs import LengthSource, PatchCost
from pipeline.bench.gates import Gate
from pipeline.bench.macs import CostRow
from pipeline.cli import tables

LARGE = Macs(linear=25594.5e9, attention=1554.6e9)
DRAWN = Sampling(conditional=LARGE)
COST = Cost(parameters=1_434_579_456, forward=LARGE, sampling=DRAWN)
LLAMAGEN = CostRow(model="llamagen-XXL", image_size=1024, cost=COST, llamagen=None, patches=None, paper_gmacs=None)
NPP = replace(LLAMAGEN, model="npp-XXL", llamagen=COST)


def dpar(source: LengthSource) -> CostRow:
    boundaries: dict[str, Sampling] = {
        "static": Sampling(),
        "entropy_head": DRAWN,
        "entropy_model": DRAWN,
        "own_entropy": DRAWN,
    }
    patches = PatchCost(mean_length=2.24, length_source=source, boundaries=boundaries)
    half = replace(COST, forward=Macs(linear=LARGE.linear / 2, attention=77.312e9))
    return CostRow(model="dpar-L-E2D3", image_size=512, cost=half, llamagen=COST, patches=patches, paper_gmacs=None)


def shown(*rows: CostRow) -> list[str]:
    console = Console(file=io.StringIO(), width=80, markup=False, highlight=False, color_system=None)
    tables.print_costs(console, rows, "B")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_row_is_one_line_of_80_columns() -> None:
    lines = shown(LLAMAGEN, NPP, dpar("extrapolated"))
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("llamagen-XXL ") for line in lines) == 2
    assert sum(line.startswith("npp-XXL ") for line in lines) == 2
    assert sum(line.startswith("dpar-L-E2D3 ") for line in lines) == 2
    assert [line.split("  ")[0] for line in lines if line.startswith("dpar-L-E2D3 s")] == ["dpar-L-E2D3 static"]
    sources = ("entropy head", "entropy model B", "own entropy")
    assert [sum(line.startswith(f"  {source} ") for line in lines) for source in sources] == [1, 1, 1]


def test_notes_are_of_the_models_that_are_shown() -> None:
    for rows in ([LLAMAGEN], [LLAMAGEN, NPP], [dpar("paper")]):
        text = "\n".join(shown(*rows))
        assert ("npp:" in text) == (NPP in rows)
        assert ("own entropy:" in text) == (LLAMAGEN not in rows)


def test_numbers_of_a_row_stand_under_their_names() -> None:
    lines = shown(LLAMAGEN, dpar("paper"))
    header = next(line for line in lines if line.startswith("model"))
    row = dict(zip(header.split(), next(line for line in lines if line.startswith("dpar")).split(), strict=True))
    assert row["linear"] == "12,797"
    assert row["attn"] == "77.31"
    assert row["train"] == "38,624"
    assert (row["paper"], row["diff"], row["saved"]) == ("-", "-", "50.0%")


@pytest.mark.parametrize("source", ["paper", "given", "extrapolated"])
def test_a_patch_length_that_nobody_published_is_marked(source: LengthSource) -> None:
    text = "\n".join(shown(dpar(source)))
    assert ("~2.24" in text) == (source == "extrapolated")
    assert ("no mean length for this image size" in text) == (source == "extrapolated")


def test_figures_stand_in_columns_above_the_gates() -> None:
    console = Console(file=io.StringIO(), width=80, markup=False, highlight=False, color_system=None)
    figures = {"llamagen-B": {"seconds a step": 2.51}, "dpar-B": {"seconds a step": 1.84, "peak memory, GB": 3.64}}
    tables.print_bench(console, [Gate(name="fid < bound", value=3.0, bound=2.0, met=False)], figures)
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert lines[:3] == [
        ["llamagen-B", "dpar-B"],
        ["seconds", "a", "step", "2.51", "1.84"],
        ["peak", "memory,", "GB", "3.64"],
    ]
    assert lines[-1] == ["fid", "<", "bound", "3", "2", "MISSED"]
