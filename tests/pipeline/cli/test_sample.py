"""`dpar sample` and `dpar export`: required artifacts, arguments passed on, output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.runtime import RuntimeConfig
from conf.sample import SampleConfig
from pipeline.cli.main import run_command
from pipeline.graph import STAGES
from pipeline.plan import StageStatus
from stages.sampling.preview import Prefix, PreviewReport, Request

REPORT = PreviewReport(classes=["cat", "dog"], mean_patch_length=1.81, seconds_per_image=0.25, device="cpu")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend that all stages are cached."""
    found = [StageStatus(name, "cached", "", "key", tmp_path / name) for name in STAGES]
    monkeypatch.setattr("pipeline.plan.plan", lambda *_: found)
    return tmp_path


@pytest.fixture
def previews(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Recorded calls of the preview functions, which are replaced by fakes."""
    calls: list[tuple[Any, ...]] = []
    for name in ("preview", "continue_image"):
        monkeypatch.setattr(
            f"stages.sampling.preview.{name}", lambda *given, name=name: calls.append((name, *given)) or REPORT
        )
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (["sample"], "dataset, tokenizer, tokenize, patch_index, train, entropy_head"),
        (["export", "--npz", "a.npz"], "sample"),
    ],
)
def test_stages_that_are_not_made_are_named(
    command: list[str], missing: str, image_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", f"dataset.root={image_root}", "--set", f"runtime.home={tmp_path}"]
    assert run_command([*command, "--preset", "tiny", *settings]) == 2
    assert f"not cached: {missing}: make them with `dpar run --until" in capsys.readouterr().err


def test_a_preview_gets_what_the_options_say(
    cached: Path, previews: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--classes", "cat, 5", "--n", "4", "--seed", "9", "--cfg-scale", "1.25", "--patches", "--out", "a.png"]
    assert run_command(["sample", "--set", "sample.top_k=50", *options]) == 0
    name, config, inputs, runtime, request, _ = previews[0]
    assert name == "preview"
    assert config == SampleConfig(seed=9, cfg_scale=1.25, top_k=50, boundaries="entropy_head")
    read = ("dataset", "tokenizer", "tokenize", "patch_index", "train", "entropy_head")  # a head decides boundaries
    assert inputs == {stage: cached / stage for stage in read}
    assert isinstance(runtime, RuntimeConfig)
    assert request == Request(classes=["cat", "5"], count=4, patches=True, output=Path("a.png"))
    said = capsys.readouterr().out
    assert "0.25  seconds per image, on cpu" in said
    assert "1.81  tokens per patch" in said
    assert "picture in a.png" in said


def test_an_image_is_continued_and_reported_as_json(
    cached: Path, previews: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["sample", "--init", "b.jpg", "--keep-rows", "3", "--classes", "cat", "--json"]) == 0
    assert previews[0][0] == "continue_image"
    assert previews[0][5] == Prefix(image=Path("b.jpg"), keep_rows=3)
    assert json.loads(capsys.readouterr().out) == {"output": "samples.png", **vars(REPORT)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["sample", "--keep-rows", "3"], "--keep-rows is set without --init"),
        (["sample", "--out", "a.jpg"], "--out is a.jpg, expected the name of a PNG file"),
        (["sample", "--n", "0"], "greater than or equal to 1"),
        (["sample", "--cfg-scale", "0.5"], "sample.cfg_scale"),
        (["export"], "nothing to export to: give --npz PATH, --png FOLDER or both"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_a_line(
    cached: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_samples_are_exported_both_ways(
    tiny_artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [StageStatus("sample", "cached", "", "key", tiny_artifacts["sample"])]
    monkeypatch.setattr("pipeline.plan.plan", lambda *_: found)
    npz, png = tmp_path / "a.npz", tmp_path / "png"
    assert run_command(["export", "--npz", str(npz), "--png", str(png), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"samples": str(tiny_artifacts["sample"]), "images": 12, "npz": str(npz), "png": str(png)}
    assert np.load(npz)["arr_0"].shape == (12, 32, 32, 3)
    assert len(list(png.iterdir())) == 12
    assert run_command(["export", "--npz", str(npz)]) == 0
    assert f"12 images in {npz}" in capsys.readouterr().out
