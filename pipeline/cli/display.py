"""Output of the command line: progress bars on a terminal, plain lines elsewhere, and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from pipeline.plan import StageStatus
from pipeline.report import Report, Score
from pipeline.runner import Observer, StageResult
from pipeline.text import duration

LINE_PERIOD_S = 15.0
KEY_CHARACTERS = 10  # shown of a key's hash
STYLES = {"cached": "green", "stale": "yellow", "missing": "cyan"}
_WIDE = 1000  # a file or pipe has no width, and programs read whole lines


def make_console(*, stderr: bool = False) -> Console:
    """A console on standard output (or standard error) that prints text verbatim: no markup, no colored numbers."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else _WIDE
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


class Screen(Observer, Protocol):
    """An observer that shows a run on the terminal while the context is open."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


def make_screen(console: Console) -> Screen:
    """A `BarScreen` on a terminal, a `LineScreen` elsewhere."""
    return BarScreen(console) if console.is_terminal else LineScreen(console)


class BarScreen:
    """A progress bar for the running stage, below one line for each finished stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            transient=True,
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        self._open("starting")
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def stage_waiting(self, stage: str, message: str) -> None:
        """Say so in the stage's bar; a warning above it names the process."""
        self._progress.update(self._open(stage), detail="waiting for another run", refresh=True)

    def stage_started(self, stage: str, key: str, work: Path) -> None:
        """Open the stage's bar; it pulses until the first progress arrives."""
        self._open(stage)

    def stage_progress(self, stage: str, progress: Mapping[str, Any]) -> None:
        """Update the stage's bar."""
        bar = self._open(stage)
        done, total = progress["done"], progress["total"]
        self._progress.update(bar, completed=done, total=total, detail=progress_text(progress), refresh=True)

    def stage_finished(self, result: StageResult) -> None:
        """Replace the bar by a line."""
        self._close(result.stage)
        self._console.print(finished_line(result, ascii_only=self._console.options.ascii_only))

    def stage_failed(self, stage: str, error: BaseException) -> None:
        """Replace the bar by a line. The error itself is printed at the end of the command."""
        self._close(stage)
        self._console.print(failed_line(stage, error))

    def _open(self, stage: str) -> TaskID:
        if stage not in self._bars:
            self._close("starting")
            self._bars[stage] = self._progress.add_task(f"{stage:<13}", total=None, detail="")
        return self._bars[stage]

    def _close(self, stage: str) -> None:
        if stage in self._bars:
            self._progress.remove_task(self._bars.pop(stage))


class LineScreen:
    """Plain lines for a log: start and end of each stage, and progress every `LINE_PERIOD_S` seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next_line = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def stage_waiting(self, stage: str, message: str) -> None:
        """Nothing: a warning says it."""

    def stage_started(self, stage: str, key: str, work: Path) -> None:
        """Print the stage and the path of its log."""
        self._console.print(f"> {stage:<13}  started  log {work / 'record' / 'log.txt'}")
        self._next_line = time.monotonic() + LINE_PERIOD_S

    def stage_progress(self, stage: str, progress: Mapping[str, Any]) -> None:
        """Print the progress, at most once in `LINE_PERIOD_S` seconds."""
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_PERIOD_S
            self._console.print(f"  {stage:<13}  {progress_text(progress)}")

    def stage_finished(self, result: StageResult) -> None:
        """Print that the stage is done."""
        self._console.print(finished_line(result, ascii_only=self._console.options.ascii_only))

    def stage_failed(self, stage: str, error: BaseException) -> None:
        """Print that the stage failed. The error itself is printed at the end of the command."""
        self._console.print(failed_line(stage, error))


def finished_line(result: StageResult, *, ascii_only: bool = False) -> Text:
    """One line for a finished stage: cached, made here, or made by another run."""
    if result.state == "cached":
        return Text(f"= {result.stage:<13}  cached", style="dim")
    mark = "+" if ascii_only else "✔"
    how = "made by another run" if result.state == "waited" else f"ran {duration(result.duration_s)}"
    line = Text.assemble((mark, "green"), f" {result.stage:<13}  {how}  key {short_key(result.key)}")
    if result.view_error is not None:
        line.append(f"\n  {result.view_error}; draw it again with `dpar views {result.stage}`", style="yellow")
    return line


def failed_line(stage: str, error: BaseException) -> Text:
    """One line for a stage that failed or was stopped. Ctrl-C and cancellation are not an `Exception`: stopped."""
    failed = isinstance(error, Exception)
    return Text(f"x {stage:<13}  {'failed' if failed else 'stopped'}", style="red" if failed else "yellow")


def progress_text(progress: Mapping[str, Any]) -> str:
    """`images 1,200/3,778  41/s  1 min 3 s left  loss 3.21`; unknown parts are left out."""
    done, total, rate = progress["done"], progress["total"], progress["per_second"]
    parts = [f"{progress['what']} {done:,}/{total:,}"]
    if rate > 0:
        parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
        if done < total:
            parts.append(f"{duration((total - done) / rate)} left")
    return "  ".join([*parts, progress["note"]]).rstrip()


def short_key(key: str | None) -> str:
    """The first characters of a key's hash, without the stage; `-` if there is no key."""
    return "-" if key is None else key.rpartition("-")[2][:KEY_CHARACTERS]


def status_table(statuses: Iterable[StageStatus]) -> Table:
    """Stages with state, key and reason."""
    table = plain_table("stage", "state", "key", "why")
    for status in statuses:
        table.add_row(
            status.stage, Text(status.state, style=STYLES[status.state]), short_key(status.key), status.reason
        )
    return table


def score_table(scores: Iterable[Score]) -> Table:
    """Scores with their meanings."""
    scores = list(scores)
    table = plain_table("score", "value", "meaning" if any(score.meaning for score in scores) else "")
    for score in scores:
        table.add_row(score.name, number(score.value), Text(score.meaning, style="dim"))
    return table


def print_report(console: Console, report: Report, home: Path) -> None:
    """Print the report of a run: scores, pictures, paths."""
    for title, scores in (
        ("distance to the training images, from best possible to worst", report.ladder),
        ("", report.scores),
    ):
        if scores:
            console.print(Text(f"\n{title}".rstrip(), style="bold"))
            console.print(score_table(scores))
    console.print(f"\nartifacts   {home}")
    for path, meaning in report.pictures:
        console.print(f"{path.name:<11} {path}  ({meaning})", soft_wrap=True)
    console.print("servers     `dpar up` starts Prefect (runs, logs) and MLflow (curves, comparisons)")


def number(value: float) -> str:
    """A number with four significant digits; integers in full."""
    if isinstance(value, int) or (value == value and abs(value) < 1e15 and value == int(value)):
        return f"{int(value):,}"
    return f"{value:.4g}"


def plain_table(*columns: str, numbers: Collection[str] = ("value", "bound")) -> Table:
    """A table without lines; columns in `numbers` are right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table
