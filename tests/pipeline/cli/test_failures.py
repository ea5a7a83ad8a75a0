from pathlib import Path

import pytest
import typer

from conf.load import SettingsError
from pipeline.cli.failures import describe_failure
from pipeline.launch import StageFailed
from stages.runtime.errors import ArtifactError, InputError


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (SettingsError("train.seed: no"), "train.seed: no", 2),
        (InputError("no such\n folder"), "no such folder", 2),
        (InputError("no folder \x1b[31mred"), r"no folder \x1b[31mred", 2),
        (InputError("no folder \udcff"), r"no folder \udcff", 2),
        (StageFailed("train", "no images", 2, Path("log.txt")), "stage train failed: no images (log: log.txt)", 2),
        (StageFailed("train", "broke", 1, Path("log.txt")), "stage train failed: broke (log: log.txt)", 1),
        (ArtifactError("damaged"), "damaged", 1),
        (KeyError("x"), "KeyError: 'x' (`dpar --debug` shows where)", 1),
        (typer.BadParameter("no such option"), "Invalid value: no such option", 2),
        (typer.Abort(), "stopped", 1),
    ],
)
def test_every_error_is_one_line_with_its_exit_code(error: Exception, line: str, code: int) -> None:
    assert describe_failure(error) == (line, code)
