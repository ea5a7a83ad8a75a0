import json
from pathlib import Path

import pytest

from pipeline.cli import patches as cli_patches
from pipeline.cli.main import run_command
from pipeline.plan import StageStatus
from stages.views.patch_report import PatchReport


def test_stages_that_are_not_made_are_named(
    image_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", f"dataset.root={image_root}", "--set", f"runtime.home={tmp_path}"]
    assert run_command(["patches", "--preset", "tiny", *settings]) == 2
    assert "not cached: dataset, tokenize, entropy_map, patch_index: make them with" in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [True, False])
def test_the_report_is_made_from_cached_artifacts_and_shown(
    image_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    as_json: bool,
) -> None:
    found = [StageStatus(name, "cached", "", "key", tmp_path / name) for name in cli_patches.INPUTS]
    monkeypatch.setattr("pipeline.plan.plan", lambda *_: found)
    numbers = PatchReport(images=45, mean_length=1.84, share_at_limit=0.2, share_by_row=None, png_correlation=0.5)

    def report(inputs: dict[str, Path], output: Path, compared: Path | None) -> PatchReport:
        assert compared == tmp_path / "map"
        assert inputs == {name: tmp_path / name for name in cli_patches.INPUTS} | {"images": image_root}
        assert output == tmp_path / "reports" / "patch_index"
        return numbers

    monkeypatch.setattr("stages.views.patch_report.patch_report", report)
    settings = ["--set", f"dataset.root={image_root}", "--set", f"runtime.home={tmp_path}"]
    options = ["--compare", str(tmp_path / "map"), *(["--json"] if as_json else [])]
    assert run_command(["patches", "--preset", "tiny", *settings, *options]) == 0
    said = capsys.readouterr().out
    if as_json:
        assert json.loads(said) == {"output": str(tmp_path / "reports" / "patch_index"), **vars(numbers)}
    else:
        assert "1.84  tokens per patch" in said
        assert "row" not in said
        assert "reports/patch_index" in said
