"""Rows of the campaign: what each did to a run, and how the run took it."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

Verdict = Literal["survived", "lost", "silent"]
"""survived: nothing finished was lost, and what was wrong was said. silent: it was not said. lost: all else."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run took a fault.

    Attributes:
        verdict: See `Verdict`.
        said: The line that the user saw.
        open_ports: Ports that processes of the row opened beyond loopback.
    """

    verdict: Verdict
    said: str
    open_ports: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault. `name` says what it is, so that the row can be repeated alone."""

    kind: str
    name: str
    run: Callable[[], Outcome]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished row."""

    kind: str
    name: str
    verdict: Verdict
    said: str
    seconds: float
    open_ports: tuple[str, ...]


class Results:
    """Finished rows in a file, one a line, so that an interrupted campaign goes on with the next row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        self._found = [Result(**json.loads(line)) for line in whole]
        path.write_text("".join(f"{line}\n" for line in whole))  # without a line that a kill has cut off

    def of(self, row: Row) -> Result | None:
        """The result of a row; None if it has not run."""
        return next((each for each in self._found if (each.kind, each.name) == (row.kind, row.name)), None)

    def add(self, result: Result) -> None:
        """Append a result."""
        self._found.append(result)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")


def run_rows(rows: Iterable[Row], results: Results, show: Callable[[Result], None]) -> list[Result]:
    """Run the rows that have no result yet, and return the results of all. An error of a row counts as lost."""
    found = []
    for row in rows:
        result = results.of(row)
        if result is None:
            result = _result(row)
            results.add(result)
        found.append(replace(result, open_ports=tuple(result.open_ports)))
        show(found[-1])
    return found


def _result(row: Row) -> Result:
    started = time.monotonic()
    try:
        outcome = row.run()
    except Exception as error:
        line = " ".join(traceback.format_exception_only(error)[-1].split())
        outcome = Outcome(verdict="lost", said=f"the row failed: {line[:300]}")
    seconds = round(time.monotonic() - started, 1)
    return Result(kind=row.kind, name=row.name, seconds=seconds, **asdict(outcome))


def table(results: Iterable[Result]) -> list[str]:
    """Lines of the summary: rows of each kind, how many survived, were lost or silent, and ports that were open."""
    results = list(results)
    lines = [f"{'kind':<10}{'rows':>6}{'survived':>10}{'lost':>6}{'silent':>8}{'seconds':>9}  ports beyond loopback"]
    for kind in [*dict.fromkeys(result.kind for result in results), "all"]:
        chosen = [result for result in results if kind in (result.kind, "all")]
        counts = [sum(result.verdict == verdict for result in chosen) for verdict in ("survived", "lost", "silent")]
        ports = sorted({port for result in chosen for port in result.open_ports})
        seconds = sum(result.seconds for result in chosen)
        lines.append(
            f"{kind:<10}{len(chosen):>6}{counts[0]:>10}{counts[1]:>6}{counts[2]:>8}{seconds:>9.0f}  "
            f"{', '.join(ports) or 'none'}"
        )
    return lines
