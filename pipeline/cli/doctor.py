"""The command `dpar doctor`: what this machine is, and what will not work on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import typer
from rich.table import Table
from rich.text import Text

from pipeline.cli import display
from pipeline.cli.options import AsJson, Overrides, load, show_json
from pipeline.doctor.finding import LEVELS, Finding, worst

app = typer.Typer(rich_markup_mode=None)
STYLES = {"ok": "green", "warning": "yellow", "blocker": "bold red"}


@app.command()
def doctor(*, overrides: Overrides, as_json: AsJson = False) -> None:
    """Check this machine: what it is, what will not work, and what to do.

    Exit code 1 if something keeps dpar from running.
    """
    from pipeline.doctor.checks import examine

    _, runtime = load(overrides=overrides)
    with display.make_console(stderr=True).status("checking this machine"):
        findings = examine(runtime)
    if as_json:
        show_json({"worst": worst(findings), "findings": [asdict(finding) for finding in findings]})
    else:
        console = display.make_console()
        console.print(finding_table(findings))
        console.print(Text(f"\n{_summary(findings)}", style="bold"))
    if worst(findings) == "blocker":
        raise typer.Exit(1)


def finding_table(findings: Sequence[Finding]) -> Table:
    """Findings with what to do below those that are not ok."""
    table = display.plain_table("", "check", "found")
    for finding in findings:
        said = Text(finding.found)
        if finding.advice:
            said.append(f"\n-> {finding.advice}", style=STYLES[finding.level])
        table.add_row(Text(finding.level, style=STYLES[finding.level]), finding.check, said)
    return table


def _summary(findings: Sequence[Finding]) -> str:
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    return ", ".join(f"{count} {level}{'s' if level != 'ok' and count != 1 else ''}" for level, count in counts.items())
