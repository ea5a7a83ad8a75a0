"""A home is made where it is missing, and refused in one line where it cannot be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cache.home import require_writable
from pipeline.cli.main import run_command
from stages.runtime.errors import InputError


def test_a_home_is_made_and_left_empty(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("home", ["/proc/dpar", "/proc/dpar/home", f"/tmp/{'x' * 256}"])
def test_a_home_that_cannot_be_made_is_one_line(home: str) -> None:
    with pytest.raises(InputError, match=f"^runtime.home is {home}, which cannot be written .*: set DPAR_HOME"):
        require_writable(Path(home))


@pytest.mark.parametrize("command", [["run", "--until", "dataset"], ["stage", "dataset"], ["up"]])
def test_a_command_that_writes_says_so_before_it_starts(
    command: list[str], image_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [] if command == ["up"] else ["--set", f"dataset.root={image_root}"]
    assert run_command([*command, "--set", "runtime.home=/proc/dpar", *images]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dpar: runtime.home is /proc/dpar, which cannot be written")
    assert error.count("\n") == 1


def test_a_command_that_only_asks_needs_no_home_that_can_be_written(
    image_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--set", "runtime.home=/proc/dpar", "--set", f"dataset.root={image_root}"]
    for command in (["status"], ["why", "train"], ["run", "--dry-run"], ["gc"]):
        assert run_command([*command, *options]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_other_packages_of_our_names_do_not_stand_for_ours(tmp_path: Path) -> None:
    for name in ("conf", "models", "stages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('another package')")
    root = Path(__file__).resolve().parents[3]
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; from pipeline.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program, "presets"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
