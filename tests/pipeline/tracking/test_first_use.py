"""Two programs that use MLflow's store for the first time at the same moment."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from pathlib import Path
from pipeline.tracking.mlflow_view import MlflowView
name, folder = sys.argv[1], Path(sys.argv[2])
(folder / f"{name}.ready").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
view = MlflowView(f"sqlite:///{folder / 'mlflow.db'}", folder)
print(view._experiment)
"""


@pytest.mark.slow
def test_both_find_the_same_experiment(tmp_path: Path) -> None:
    """Each creates the database and the experiment, if it looks before the other has done so."""
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, name, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("first", "second")
    ]
    while len(list(tmp_path.glob("*.ready"))) < len(programs):
        assert all(program.poll() is None for program in programs)
        time.sleep(0.05)
    (tmp_path / "go").touch()
    said = [(*program.communicate(timeout=200), program.returncode) for program in programs]
    assert [code for _, _, code in said] == [0, 0], said
    assert len({experiment for experiment, _, _ in said}) == 1
