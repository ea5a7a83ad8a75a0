import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.cli import display
from pipeline.cli.display import BarScreen, LineScreen, make_screen, number, progress_text
from pipeline.plan import StageStatus
from pipeline.report import Report, Score
from pipeline.runner import StageResult

STEPS: dict[str, Any] = {"what": "steps", "done": 250, "total": 1000, "per_second": 3.3, "note": "loss 3.21"}


def console(*, terminal: bool) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=100, markup=False, highlight=False, color_system=None
    )


def written(screen_console: Console) -> str:
    assert isinstance(screen_console.file, io.StringIO)
    return screen_console.file.getvalue()


def result(stage: str, state: Any, duration_s: float = 31.0) -> StageResult:
    return StageResult(stage, state, f"{stage}-0123456789abcdef", Path("artifact"), "digest", {}, duration_s)


def play(screen_console: Console) -> str:
    with make_screen(screen_console) as screen:
        screen.stage_finished(result("dataset", "cached"))
        screen.stage_started("train", "train-0123456789abcdef", Path("work"))
        screen.stage_progress("train", STEPS)
        screen.stage_finished(result("train", "ran"))
        screen.stage_started("sample", "sample-0123456789abcdef", Path("work"))
        screen.stage_failed("sample", ValueError("no"))
    return written(screen_console)


def test_a_terminal_gets_bars_and_keeps_a_line_for_each_stage() -> None:
    screen_console = console(terminal=True)
    assert isinstance(make_screen(screen_console), BarScreen)
    text = play(screen_console)
    assert "250/1,000" in text
    for line in ("= dataset        cached", "train          ran 31 s  key 0123456789", "x sample         failed"):
        assert line in text


def test_a_log_gets_lines_without_control_codes() -> None:
    screen_console = console(terminal=False)
    assert isinstance(make_screen(screen_console), LineScreen)
    lines = play(screen_console).splitlines()
    assert [line.split()[1] for line in lines] == ["dataset", "train", "train", "sample", "sample"]
    assert "\x1b" not in written(screen_console)
    assert "work/record/log.txt" in lines[1]


def test_lines_of_progress_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    screen_console, clock = console(terminal=False), [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    screen = LineScreen(screen_console)
    screen.stage_started("train", "train-0", Path("work"))
    for clock[0] in range(61):
        screen.stage_progress("train", STEPS)
    assert written(screen_console).count("250/1,000") == 60 // display.LINE_PERIOD_S


def test_an_ascii_terminal_gets_ascii() -> None:
    assert display.finished_line(result("train", "ran"), ascii_only=True).plain.isascii()


def test_a_stopped_stage_has_not_failed() -> None:
    assert display.failed_line("train", KeyboardInterrupt()).plain == "x train          stopped"
    assert display.failed_line("train", ValueError()).plain == "x train          failed"


def test_progress_tells_rate_and_time_left_when_known() -> None:
    assert progress_text(STEPS) == "steps 250/1,000  3.3/s  3 min 47 s left  loss 3.21"
    assert progress_text(STEPS | {"per_second": 0.0, "note": ""}) == "steps 250/1,000"
    assert progress_text(STEPS | {"done": 1000}) == "steps 1,000/1,000  3.3/s  loss 3.21"


@pytest.mark.parametrize(
    ("value", "text"), [(3778, "3,778"), (0.123456, "0.1235"), (2.0, "2"), (float("nan"), "nan"), (float("inf"), "inf")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_tables_hold_every_row() -> None:
    table_console = console(terminal=False)
    table_console.print(
        display.status_table(
            [
                StageStatus("dataset", "cached", "unchanged", "dataset-0123456789abcdef", Path("here")),
                StageStatus("train", "stale", "setting train.seed: 0 -> 1", None, None),
            ]
        )
    )
    text = written(table_console)
    assert "dataset  cached  0123456789  unchanged" in text
    assert "train    stale   -           setting train.seed: 0 -> 1" in text


def test_the_report_shows_scores_pictures_and_where_they_lie(tmp_path: Path) -> None:
    report_console = console(terminal=False)
    report = Report(
        source="evaluate",
        ladder=(Score(name="fd_lite0", value=0.25, meaning="images drawn from the model"),),
        scores=(Score(name="num_samples", value=450, meaning=""),),
        pictures=((tmp_path / "grid.png", "samples"),),
    )
    display.print_report(report_console, report, tmp_path)
    text = written(report_console).replace("\n", "")
    for piece in ("fd_lite0", "0.25", "images drawn from the model", "450", str(tmp_path / "grid.png"), "dpar up"):
        assert piece in text
