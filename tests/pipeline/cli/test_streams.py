"""`dpar` as a program among others: closed streams, readers that leave, terminals without our characters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent.parent
DPAR = f"{sys.executable} -m pipeline.cli.main"


def shell(command: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | {name: text for name, text in variables.items() if text}
    for name in [name for name, text in variables.items() if text is None]:
        environment.pop(name, None)
    return subprocess.run(
        ["bash", "-c", command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def test_a_reader_may_leave_early() -> None:
    for command in ("config", "presets --json", "flops --model dpar-B --image-size 256", "--help"):
        done = shell(f"{DPAR} {command} | :; echo ${{PIPESTATUS[0]}}")
        assert (done.stdout, done.stderr) == ("1\n", ""), command


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(closed: str) -> None:
    done = shell(f"{DPAR} presets {closed}")
    assert (done.returncode, done.stderr) == (0, "")
    wrong = shell(f"{DPAR} stage nothing {closed}")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == (0 if "2>&-" in closed else 1)


@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"TERM": "dumb", "COLUMNS": "1", "NO_COLOR": "1"},
        {"COLUMNS": "wide", "TZ": "Nowhere/Land"},
        {"HOME": None, "TMPDIR": "/nowhere"},
    ],
    ids=str,
)
def test_odd_terminals_and_environments_change_no_exit_code(variables: dict[str, str | None], tmp_path: Path) -> None:
    (tmp_path / "ä" / "cat").mkdir(parents=True)
    home = f"--set runtime.home={tmp_path / 'home'}"
    for command, code in (
        ("presets", 0),
        (f"status --set dataset.root={tmp_path / 'ä'} {home}", 0),
        (f"status --set dataset.root={tmp_path / 'ö'} {home}", 2),
    ):
        done = shell(f"{DPAR} {command}", **variables)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
