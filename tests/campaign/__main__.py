"""Runs the campaign and prints a line for each row, and a summary. Exit code 1 if anything was lost or silent."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from campaign import damage, hostile, kills, servers
from campaign.rows import Result, Results, Row, run_rows, table
from campaign.workplace import Workplace

from pipeline.graph import STAGES

KINDS = {module.KIND: module.rows for module in (kills, damage, hostile, servers)}


def rows(place: Workplace, chosen: list[str], times: int, seed: int) -> Iterator[Row]:
    """All rows of the chosen kinds."""
    for kind in chosen:
        yield from KINDS[kind](place, times, seed)


def arguments(words: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="PYTHONPATH=tests python -m campaign", description=__doc__)
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind; several times for several")
    parser.add_argument(
        "--times", type=int, default=20, help="kills of each kind of process, hostile inputs, and half of the damages"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of times, files and bits")
    parser.add_argument("--match", default="", help="only rows whose name holds this text")
    parser.add_argument("--until", choices=STAGES, default=list(STAGES)[-1], help="last stage of the runs")
    parser.add_argument("--timeout", type=float, default=1800.0, help="longest time of one run, seconds")
    parser.add_argument("--folder", type=Path, default=None, help="where it works and resumes; default below /tmp")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    """Run the campaign."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers of a row are stopped
    chosen = arguments(words)
    folder = (chosen.folder or Path(tempfile.gettempdir()) / f"dpar-campaign-{chosen.seed}-{chosen.until}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    place = Workplace(folder, chosen.until, chosen.timeout)
    known = rows(place, chosen.kind or list(KINDS), chosen.times, chosen.seed)

    def show(result: Result) -> None:
        if not chosen.json:
            said = f"{result.kind}: {result.name}: {result.said}"
            sys.stdout.write(f"{result.verdict:<9} {result.seconds:>6.0f} s  {said}\n")
            sys.stdout.flush()

    found = run_rows((row for row in known if chosen.match in row.name), Results(folder / "results.jsonl"), show)
    text = json.dumps([asdict(result) for result in found], indent=1) if chosen.json else "\n".join(table(found))
    sys.stdout.write(text + "\n")
    return int(any(result.verdict != "survived" for result in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
