"""Every benchmark script runs at toy size and prints what `dpar bench` reads. Toy sizes may miss the bounds."""

from __future__ import annotations

import ast
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench.gates import SCRIPTS, Gate

FOLDER = Path(__file__).parent
GPU_CHECK = "gpu_check.py"
TINY_SAMPLERS = ("--batches", "1", "--entropy-models", "tiny")
TOY: dict[str, tuple[str, ...]] = {
    "data_loader.py": ("--images", "512", "--rounds", "1"),
    "data_stores.py": ("--chunks", "1", "--rounds", "1"),
    "draws.py": (
        *("--draws", "200", "--entropies", "1", "3"),
        *("--batches", "1", "2", "--vocabulary", "300", "--rounds", "2"),
    ),
    GPU_CHECK: ("--tiny",),
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
QUICK = {"draws.py", "structure.py"}


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


def check_report(line: str, *, gated: bool) -> None:
    """It is what `dpar bench` reads from the last line that a script prints."""
    told = json.loads(line)
    gates = [Gate(**gate) for gate in told["gates"]]
    assert bool(gates) == gated
    assert len({gate.name for gate in gates}) == len(gates)
    assert all(math.isfinite(gate.value) and math.isfinite(gate.bound) for gate in gates)
    assert told["figures"]
    assert all(math.isfinite(value) for column in told["figures"].values() for value in column.values())


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(TOY.keys() - {GPU_CHECK})
    ],
)
def test_a_script_prints_what_bench_reads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported what takes seconds: a process of its own would show no more."""
    options = ("--curve", str(tmp_path / "curve.png")) if name == "sample_parts.py" else ()
    monkeypatch.setattr(sys, "argv", [name, *TOY[name], *options])
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(tmp_path)
    # Of the processes that scripts start.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    runpy.run_path(str(FILES[name]), run_name="__main__")
    check_report(capsys.readouterr().out.splitlines()[-1], gated=name not in WITHOUT_GATES)


def gpu_checks(folder: Path, *options: tuple[str, ...], blocked: tuple[str, ...] = ()) -> list[list[dict[str, Any]]]:
    """What the GPU check prints with each of `options`, in turn in one new process: it sets the process's alarm."""
    program = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({blocked!r}))
sys.path.insert(0, {str(FOLDER)!r})
for options in {options!r}:
    sys.argv = [{GPU_CHECK!r}, *options]
    runpy.run_path({str(FILES[GPU_CHECK])!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        # Code for one step would be compiled for a minute.
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1]), "TORCH_COMPILE_DISABLE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[dict[str, Any]]] = [[]]
    for line in map(json.loads, done.stdout.splitlines()):
        found[-1].append(line)
        if "gates" in line:
            found.append([])
    return found[:-1]


@pytest.mark.slow
def test_the_gpu_check_runs_without_the_packages_of_stages_and_pipeline(tmp_path: Path) -> None:
    """On a machine lent for ten minutes there is torch, and not much else."""
    blocked = ("zarr", "pydantic", "pydantic_settings", "xformers", "pyarrow", "yaml", "prefect", "mlflow", "typer")
    (lines,) = gpu_checks(tmp_path, TOY[GPU_CHECK], blocked=blocked)
    assert {line["part"] for line in lines[:-1]} >= {"device", "attention", "training", "tokenizer"}
    assert not any("failed" in line for line in lines[:-1])
    assert lines[-1]["gates"][-1]["name"].startswith("parts of the check that failed or found no time")
    assert lines[-1]["gates"][-1]["met"]
    check_report(json.dumps(lines[-1]), gated=True)


@pytest.mark.slow
def test_the_gpu_check_ends_in_time_and_a_failed_part_stops_no_other(tmp_path: Path) -> None:
    """Without the part `device` there is nothing to compare training with."""
    parts = ("--tiny", "--parts", "training", "attention")
    lines, (told, report) = gpu_checks(tmp_path, parts, (*parts, "--seconds", "0.001"))
    assert "the part `device` has not run" in next(line["failed"] for line in lines if "failed" in line)
    assert any(line.get("part") == "attention" for line in lines)
    assert told["unfinished"] == ["training", "attention"]
    assert [gate["met"] for gate in report["gates"]] == [False]
