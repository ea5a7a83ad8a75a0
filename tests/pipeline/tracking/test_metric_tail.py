import json
import os
from pathlib import Path

from pipeline.tracking.metric_tail import MetricTail, Point, StageRun


def write(folder: Path, *steps: int, torn: str = "") -> None:
    """Replace metrics.jsonl, as a resumed stage does."""
    path = folder / "record" / "metrics.jsonl"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps({"step": step, "loss": step / 10}) + "\n" for step in steps) + torn)
    os.replace(partial, path)


def test_only_new_and_whole_lines_are_read(tmp_path: Path) -> None:
    tail = MetricTail(tmp_path)
    assert tail.points() == []
    write(tmp_path, 1, 2, torn='{"step": 3, "lo')
    assert tail.points() == [Point("loss", 1, 0.1), Point("loss", 2, 0.2)]
    with (tmp_path / "record" / "metrics.jsonl").open("a") as file:
        file.write('ss": 0.3}\n')
    assert tail.points() == [Point("loss", 3, 0.3)]


def test_a_file_that_was_replaced_is_read_from_its_start(tmp_path: Path) -> None:
    tail = MetricTail(tmp_path)
    write(tmp_path, 1, 2)
    tail.points()
    write(tmp_path, 1, 5, 6)  # longer than before, so its size does not show the replacement
    assert [point.step for point in tail.points()] == [1, 5, 6]


def test_a_run_knows_the_last_step_of_each_curve(tmp_path: Path) -> None:
    run = StageRun("abc")
    run.add([Point("loss", 4, 0.0), Point("psnr", 2, 0.0)])
    run.write(tmp_path, "train-1")
    known = StageRun.read(tmp_path, "train-1")
    assert known == run
    assert known is not None
    points = [Point("loss", 4, 1.0), Point("psnr", 4, 1.0), Point("loss", 5, 1.0)]
    assert known.fresh(points) == points[1:]
    assert StageRun.read(tmp_path, "train-2") is None
