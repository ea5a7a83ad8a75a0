"""`dpar views`, and what `dpar status` says of stages that are left out: drawing itself is replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline import views
from pipeline.cli.main import run_command
from pipeline.graph import STAGES, Stage
from pipeline.plan import StageStatus

Drawn = list[str]
TITLE = "was not drawn: no space left"


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[set[str]], None]:
    """Say which stages are cached, under any settings."""

    def plan(names: set[str]) -> None:
        statuses = [
            StageStatus(name, "cached", "unchanged", f"{name}-0", tmp_path / name)
            if name in names
            else StageStatus(name, "missing", "not made yet", f"{name}-0", tmp_path / name)
            for name in STAGES
        ]
        monkeypatch.setattr("pipeline.cli.run.plan", lambda *_, **__: statuses)

    return plan


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Names of the stages whose views were drawn; that of `train` fails."""
    names: Drawn = []

    def draw(stage: Stage, *_: Any) -> str | None:
        names.append(stage.name)
        return f"the view of {stage.name} {TITLE}" if stage.name == "train" else None

    monkeypatch.setattr(views, "draw", draw)
    return names


def test_what_is_cached_is_drawn_again_though_it_is_current(
    cached: Callable[[set[str]], None],
    drawn: Drawn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(views, "is_current", lambda *_: True)
    cached({"dataset", "patch_index"})
    assert run_command(["views", "--preset", "tiny"]) == 0
    assert drawn == ["dataset", "patch_index"]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [[name, str(tmp_path / name / "views")] for name in drawn]


def test_a_stage_that_is_named_is_drawn_alone(cached: Callable[[set[str]], None], drawn: Drawn) -> None:
    cached({"dataset", "patch_index"})
    assert run_command(["views", "patch_index", "--preset", "tiny"]) == 0
    assert drawn == ["patch_index"]


def test_a_view_that_fails_is_the_exit_code_and_the_others_are_drawn(
    cached: Callable[[set[str]], None], drawn: Drawn, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cached({"dataset", "train", "sample"})
    assert run_command(["views", "--preset", "tiny"]) == 1
    assert drawn == ["dataset", "train", "sample"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"the view of train {TITLE}"
    assert [line.split()[0] for line in (lines[0], lines[2])] == ["dataset", "sample"]


def test_as_json_every_view_has_its_path_and_its_error(
    cached: Callable[[set[str]], None], drawn: Drawn, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cached({"dataset", "train"})
    assert run_command(["views", "--json", "--preset", "tiny"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "views": {
            "dataset": {"path": str(tmp_path / "dataset" / "views"), "error": None},
            "train": {"path": str(tmp_path / "train" / "views"), "error": f"the view of train {TITLE}"},
        }
    }


def test_where_nothing_is_cached_nothing_is_drawn_and_that_is_said(
    cached: Callable[[set[str]], None], drawn: Drawn, capsys: pytest.CaptureFixture[str]
) -> None:
    cached(set())
    assert run_command(["views", "--preset", "tiny"]) == 0
    assert capsys.readouterr().out == "no view to draw: no stage is cached with these settings\n"
    assert run_command(["views", "--json", "--preset", "tiny"]) == 0
    assert json.loads(capsys.readouterr().out) == {"views": {}}
    assert drawn == []


def test_an_unknown_stage_is_one_line_and_code_2(drawn: Drawn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["views", "nosuch", "--preset", "tiny"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("dpar: stage is 'nosuch', expected one of dataset, tokenizer, ")
    assert drawn == []


UNREAD = {
    ("--ablation", "llamagen"): ["entropy_model", "entropy_map", "patch_index", "entropy_head"],
    ("--ablation", "static"): ["entropy_model", "entropy_map", "entropy_head"],
}


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Settings of a run over one image, with a home of its own."""
    (tmp_path / "images" / "cat").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "cat" / "0.png")
    places = (f"dataset.root={tmp_path / 'images'}", f"runtime.home={tmp_path / 'home'}")
    return [word for place in places for word in ("--set", place)]


@pytest.mark.parametrize("ablation", UNREAD, ids=lambda words: words[-1])
def test_status_leaves_out_what_nothing_reads_and_says_so(
    ablation: tuple[str, str], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    read = [name for name in STAGES if name not in UNREAD[ablation]]
    assert run_command(["status", "--json", *ablation, *options]) == 0
    assert [stage["stage"] for stage in json.loads(capsys.readouterr().out)["stages"]] == read
    assert run_command(["status", *ablation, *options]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith("not used")] == [
        f"not used with these settings: {', '.join(UNREAD[ablation])}"
    ]
    assert [word for line in lines for word in line.split()[:1] if word in STAGES] == read


def test_status_says_nothing_of_the_kind_where_all_stages_are_read(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["status", *options]) == 0
    assert "not used" not in capsys.readouterr().out
