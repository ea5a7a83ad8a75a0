"""Scores come from two tables: an entry in each is a score everywhere, an entry in one alone is refused on import."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pipeline.report
from conf.evaluate import EvaluateConfig
from conf.runtime import RuntimeConfig
from stages.runtime.artifact import read_json
from stages.scores.feature_sets import ExtractorInfo, FeatureSets
from stages.scores.statistics import FeatureStats
from stages.scores.table import SCORES, ScoreInfo
from stages.views import evaluate as view
from stages.views.evaluate import COMPUTED, Found, check_entries

ROOT = Path(__file__).resolve().parents[3]
TOY = ScoreInfo(
    names={"lite0": "largest_lite0", "inception": "largest_inception"},
    meaning="largest feature of a sample",
    better="higher",
    source="nowhere",
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished artifact of stage `evaluate`: four features of twelve samples and nine other images."""
    generator = np.random.default_rng(0)
    real, samples = (generator.normal(size=(count, 4)).astype(np.float32) for count in (9, 12))
    path = tmp_path_factory.mktemp("evaluate")
    FeatureSets(
        extractor=ExtractorInfo(name="lite0", weights_sha256="0" * 64, fid_inception=False, input_size=224),
        features={"samples": samples},
        samples_logits=generator.normal(size=(12, 5)).astype(np.float32),
        reference=FeatureStats.of(real),
        compared=real,
    ).write(path)
    return path


def largest(found: Found) -> dict[str, float]:
    return {"largest": float(found.sets.features["samples"].max())}


def metrics(artifact: Path, output: Path) -> dict[str, float]:
    """What the view writes."""
    output.mkdir(parents=True)
    view.evaluate(EvaluateConfig(), {"evaluate": artifact}, output, RuntimeConfig(device="cpu"))
    return dict(read_json(output / "metrics.json"))


def test_two_entries_are_a_score_in_metrics_report_and_meaning(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = metrics(artifact, tmp_path / "before")
    monkeypatch.setitem(SCORES, "largest", TOY)
    monkeypatch.setitem(COMPUTED, ("largest",), largest)
    check_entries(COMPUTED, SCORES)
    importlib.reload(pipeline.report)
    try:
        found = metrics(artifact, tmp_path / "evaluate" / "views")
        wanted = float(FeatureSets.open(artifact).features["samples"].max())
        assert found == before | {"largest_lite0": wanted}
        report = pipeline.report.collect({"evaluate": tmp_path / "evaluate"})
        (score,) = [each for each in report.scores if each.name == "largest_lite0"]
        assert score.value == wanted
        assert score.meaning == "largest feature of a sample, higher is better"
        assert pipeline.report.numbers(report) == found
    finally:
        monkeypatch.undo()
        importlib.reload(pipeline.report)
    assert "largest_lite0" not in pipeline.report.MEANINGS


def test_the_tables_agree() -> None:
    check_entries(COMPUTED, SCORES)


def test_a_score_with_code_and_no_entry_is_refused() -> None:
    with pytest.raises(ValueError, match=r"largest is computed and has no entry in stages/scores/table\.py$"):
        check_entries(COMPUTED | {("largest",): largest}, SCORES)


def test_a_score_with_an_entry_and_no_code_is_refused() -> None:
    with pytest.raises(ValueError, match=r"largest has an entry and is not computed in stages/views/evaluate\.py$"):
        check_entries(COMPUTED, SCORES | {"largest": TOY})


def test_a_score_that_is_computed_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="recall is computed twice"):
        check_entries(COMPUTED | {("recall",): largest}, SCORES)


@pytest.mark.parametrize(
    ("file", "pattern", "message"),
    [
        ("stages/scores/table.py", r'    "recall": ScoreInfo\(.*?\n    \),\n', "recall is computed and has no entry"),
        ("stages/views/evaluate.py", r'    \("inception_score",\): .*?\n', "inception_score has an entry and is not"),
    ],
    ids=["entry removed", "code removed"],
)
def test_the_check_is_made_on_import(tmp_path: Path, file: str, pattern: str, message: str) -> None:
    for package in ("stages", "models", "conf"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (tmp_path / file).read_text()
    edited, count = re.subn(pattern, "", text, flags=re.DOTALL)
    assert count == 1
    (tmp_path / file).write_text(edited)
    done = subprocess.run(
        [sys.executable, "-c", "import stages.views.evaluate"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
