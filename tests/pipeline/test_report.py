import json
from pathlib import Path

import pytest

from pipeline.report import collect, numbers
from pipeline.views import read_metrics

SCORES = {
    "fd_lite0": 0.4,
    "fd_lite0_samples": 0.5,
    "fd_lite0_heldout": 0.1,
    "fd_lite0_reconstruction": 0.2,
    "fd_lite0_marginals": 0.8,
    "fd_lite0_random": 0.9,
    "recall_lite0": 0.25,
    "num_samples": 450,
}


def artifact(home: Path, stage: str, metrics: dict[str, float] | None, *pictures: str) -> Path:
    path = home / stage / f"{stage}-0123"
    (path / "views").mkdir(parents=True)
    if metrics is not None:
        (path / "views" / "metrics.json").write_text(json.dumps(metrics))
    for name in pictures:
        (path / "views" / name).write_bytes(b"png")
    return path


def test_ladder_runs_from_the_best_possible_to_the_worst(tmp_path: Path) -> None:
    report = collect({"evaluate": artifact(tmp_path, "evaluate", SCORES)})
    assert [(rung.name, rung.value) for rung in report.ladder] == [
        ("fd_lite0_heldout", 0.1),
        ("fd_lite0_reconstruction", 0.2),
        ("fd_lite0_samples", 0.5),
        ("fd_lite0_marginals", 0.8),
        ("fd_lite0_random", 0.9),
    ]
    assert all(rung.meaning for rung in report.ladder)


def test_other_scores_keep_their_order_and_are_explained_where_they_need_it(tmp_path: Path) -> None:
    report = collect({"evaluate": artifact(tmp_path, "evaluate", SCORES)})
    assert [score.name for score in report.scores] == ["fd_lite0", "recall_lite0", "num_samples"]
    assert "training images" in report.scores[0].meaning
    assert report.scores[2].meaning == ""


def test_without_held_out_images_there_is_no_ladder(tmp_path: Path) -> None:
    report = collect({"evaluate": artifact(tmp_path, "evaluate", {"fid": 2.5, "inception_score": 3.0})})
    assert report.ladder == ()
    assert [score.name for score in report.scores] == ["fid", "inception_score"]


def test_a_run_that_stops_early_reports_its_last_stage_with_numbers(tmp_path: Path) -> None:
    report = collect(
        {
            "dataset": artifact(tmp_path, "dataset", {"num_images": 3}),
            "tokenize": artifact(tmp_path, "tokenize", None),
        }
    )
    assert report.source == "dataset"
    assert [score.name for score in report.scores] == ["num_images"]
    assert report.ladder == report.pictures == ()


def test_numbers_of_earlier_stages_stand_behind_the_scores(tmp_path: Path) -> None:
    report = collect(
        {
            "tokenizer": artifact(tmp_path, "tokenizer", {"psnr": 20.5, "num_images": 9}),
            "train": artifact(tmp_path, "train", {"heldout_loss": 3.5, "unigram_loss": 5.25}),
            "evaluate": artifact(tmp_path, "evaluate", SCORES),
        }
    )
    found = numbers(report)
    carried = {"tokenizer_psnr": 20.5, "train_heldout_loss": 3.5, "train_unigram_loss": 5.25}
    assert found == SCORES | carried
    assert list(found)[-3:] == list(carried)
    assert all(score.meaning for score in report.scores if score.name in carried)


def test_only_pictures_that_exist_are_named(tmp_path: Path) -> None:
    index = artifact(tmp_path, "patch_index", None, "patches.png")
    assert [path for path, _ in collect({"patch_index": index}).pictures] == [index / "views" / "patches.png"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"fid": "2.5"}'])
def test_damaged_numbers_are_none(tmp_path: Path, text: str) -> None:
    path = artifact(tmp_path, "evaluate", SCORES)
    (path / "views" / "metrics.json").write_text(text)
    assert read_metrics(path) == {}
