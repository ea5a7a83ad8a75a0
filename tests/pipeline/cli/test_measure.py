"""`dpar bench` and `dpar flops`: exit codes of gates, costs as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench import gates
from pipeline.cli.main import run_command
from pipeline.graph import STAGES
from pipeline.plan import StageStatus


@pytest.mark.parametrize(("reconstruction", "code"), [(0.15, 0), (0.0, 1)])
def test_a_missed_gate_is_the_exit_code(
    reconstruction: float,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    metrics = {name: bound * (0.9 if relation == "<" else 1.1) for name, relation, bound in gates.BOUNDS}
    metrics |= dict.fromkeys(("entropy_model_heldout_loss", "train_heldout_loss"), 4.0)
    metrics |= dict.fromkeys(("entropy_model_unigram_loss", "train_unigram_loss"), 5.0)
    metrics |= {name: 0.1 * place for place, name in enumerate(gates.LADDER)}
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "metrics.json").write_text(json.dumps(metrics | {"fd_lite0_reconstruction": reconstruction}))
    cached = [StageStatus(stage, "cached", "unchanged", f"{stage}-0", tmp_path) for stage in STAGES]
    monkeypatch.setattr("pipeline.plan.plan", lambda *settings: cached)
    assert run_command(["bench", "demo", "--json"]) == code
    told = json.loads(capsys.readouterr().out)["gates"]
    assert {tuple(gate) for gate in told} == {("name", "value", "bound", "met")}
    assert [gate["name"] for gate in told if not gate["met"]] == ["fd_lite0_heldout < fd_lite0_reconstruction"][:code]


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from report import report
from pipeline.bench.gates import gate
report([gate("speed", {value}, "<", 2.0)], {{"dpar": {{"seconds": 1.5}}}})
"""


@pytest.mark.parametrize(("value", "code"), [(1.0, 0), (3.0, 1)])
def test_a_script_tells_its_gates_and_figures(
    value: float, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "one.py").write_text(SCRIPT.format(folder=str(gates.SCRIPTS_FOLDER), value=value))
    monkeypatch.setattr(gates, "SCRIPTS", {"one": ("one.py",)})
    monkeypatch.setattr(gates, "SCRIPTS_FOLDER", tmp_path)
    assert run_command(["bench", "one", "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["gates"] == [{"name": "speed", "value": value, "bound": 2.0, "met": not code}]
    assert told["figures"] == {"dpar": {"seconds": 1.5}}


def test_a_script_that_fails_or_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gates, "SCRIPTS", {"one": ("one.py",)})
    monkeypatch.setattr(gates, "SCRIPTS_FOLDER", tmp_path)
    assert run_command(["bench", "one"]) == 2
    assert "expected the source tree of dpar" in capsys.readouterr().err
    (tmp_path / "one.py").write_text("raise SystemExit(3)")
    assert run_command(["bench", "one"]) == 1
    assert "one.py of benchmark one ended with exit code 3" in capsys.readouterr().err


def test_every_script_is_there() -> None:
    assert all((gates.SCRIPTS_FOLDER / script).is_file() for names in gates.SCRIPTS.values() for script in names)


def test_a_benchmark_needs_the_finished_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "cli", "--set", f"runtime.home={tmp_path}"]) == 2
    assert "dpar run --preset demo" in capsys.readouterr().err


def costs(capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    assert run_command(["flops", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_costs_as_json_are_counts(capsys: pytest.CaptureFixture[str]) -> None:
    told = costs(capsys, "--model", "llamagen-T", "--model", "dpar-B", "--image-size", "128", "--entropy-model", "T")
    assert told["entropy_model"] == "T"
    llamagen, dpar = told["rows"]
    assert (llamagen["model"], llamagen["mean_length"], len(llamagen["sampling"])) == ("llamagen-T", None, 1)
    assert llamagen["forward"]["linear"] == 64 * (6 * (4 * 512**2 + 3 * 512 * 1536) + 16384 * 512)
    assert (dpar["mean_length"], dpar["mean_length_source"], dpar["paper_gmacs"]) == (1.38, "extrapolated", None)
    assert [sampling["boundaries"] for sampling in llamagen["sampling"]] == [None]
    sources = [sampling["boundaries"] for sampling in dpar["sampling"]]
    assert sources == ["static", "entropy_head", "entropy_model", "own_entropy"]
    alone, _, with_entropy_model = dpar["sampling"][:3]
    added = with_entropy_model["guided"]["linear"] - alone["guided"]["linear"]
    assert added == pytest.approx(llamagen["forward"]["linear"] * 63 / 64), "the entropy model reads no class"


@pytest.mark.slow
def test_costs_as_tables_show_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "llamagen-T", "--model", "dpar-B", "--image-size", "64", "--mean-length", "2"]
    assert run_command(["flops", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("llamagen-T")] == [["llamagen-T", "64"]] * 2
    assert next(line.split()[2] for line in lines if line.startswith("dpar-B")) == "2.00"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["bench", "nosuch"], "benchmark is 'nosuch', expected one of demo, cli"),
        (["flops", "--model", "dpar-T"], "model is 'dpar-T', expected one of llamagen-T, llamagen-B"),
        (["flops", "--entropy-model", "L"], "entropy model is 'L', expected one of B, T"),
        (["flops", "--image-size", "100"], "image size is 100, expected a multiple of 16 in 32 .. 1024 pixels"),
        (["flops", "--model", "dpar-B", "--image-size", "64"], "add --mean-length"),
        (["flops", "--model", "dpar-B", "--mean-length", "0.5"], "mean patch length is 0.5, expected 1 .. 128"),
    ],
)
def test_a_user_error_is_one_line_and_code_2(
    command: list[str], message: str, user_error: Callable[[list[str]], str]
) -> None:
    assert message in user_error(command)
