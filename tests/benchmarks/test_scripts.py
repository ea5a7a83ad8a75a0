"""Every benchmark script runs at toy size and prints what `dpar bench` reads. Toy sizes may miss the bounds."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.bench.gates import SCRIPTS, Gate

FOLDER = Path(__file__).parent
TINY_SAMPLERS = ("--batches", "1", "--entropy-models", "tiny")
TOY: dict[str, tuple[str, ...]] = {
    "data_loader.py": ("--images", "512", "--rounds", "1"),
    "data_stores.py": ("--chunks", "1", "--rounds", "1"),
    "image_stages.py": (
        *("--images", "1", "--batch-size", "1", "--pixels", "32", "--demo-images", "4"),
        *("--few", "20", "--rounds", "1"),
    ),
    "loop_overhead.py": ("--dim", "32", "--layers", "1", "--images", "2", "--steps", "2", "--rounds", "1"),
    "sample_parts.py": ("--sizes", "tiny", "--pixels", "256", "--batch", "1", "--curve-size", "tiny", *TINY_SAMPLERS),
    "sample_speed.py": (
        *("--size", "tiny", "--loop-batch", "1", "--linear-batches", "1", "--rivals", "tiny"),
        *TINY_SAMPLERS,
    ),
    "stage_memory.py": ("--few", "20", "--until", "dataset"),
    "structure.py": (),
    "train_step.py": ("--sizes", "tiny", "--images", "1", "--rounds", "1"),
}
"""Options of each script."""
WITHOUT_GATES = {"sample_parts.py"}
QUICK = {"structure.py"}


def is_script(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_text()).body)


FILES = {path.name: path for path in sorted(FOLDER.glob("*.py")) if path.name != Path(__file__).name}
RUN_BY_THEMSELVES = {name for name, path in FILES.items() if is_script(path)}


def test_every_script_has_a_toy_size_and_belongs_to_a_benchmark() -> None:
    assert set(TOY) == RUN_BY_THEMSELVES
    assert {script for scripts in SCRIPTS.values() for script in scripts} == RUN_BY_THEMSELVES


def imported_by(path: Path) -> set[str]:
    return {node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}


def test_every_other_file_is_imported_by_a_script() -> None:
    """So the scripts' runs show that it can be imported."""
    reached = set(RUN_BY_THEMSELVES)
    while more := {f"{name}.py" for file in reached for name in imported_by(FILES[file])} & FILES.keys() - reached:
        reached |= more
    assert reached == FILES.keys()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(TOY)]
)
def test_a_script_prints_what_bench_reads(name: str, tmp_path: Path) -> None:
    options = ("--curve", str(tmp_path / "curve.png")) if name == "sample_parts.py" else ()
    done = subprocess.run(
        [sys.executable, FILES[name], *TOY[name], *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    gates = [Gate(**gate) for gate in told["gates"]]
    assert bool(gates) == (name not in WITHOUT_GATES)
    assert len({gate.name for gate in gates}) == len(gates)
    assert all(math.isfinite(gate.value) and math.isfinite(gate.bound) for gate in gates)
    assert told["figures"]
    assert all(math.isfinite(value) for column in told["figures"].values() for value in column.values())
