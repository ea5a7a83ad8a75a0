"""Two first runs at the same time on a fresh home, one of them with two processes, in a folder of hostile files."""

from __future__ import annotations

from pathlib import Path

import hostile_folder
import pytest
from listening import watched

from pipeline.processes import HOST
from pipeline.servers.commands import PREFECT_APP


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_succeed_run_no_file_of_the_folder_and_listen_on_loopback_only(tmp_path: Path, image_root: Path) -> None:
    here = hostile_folder.make(tmp_path / "here", tmp_path / "ran")
    arguments = ["run", "--preset", "tiny", "--set", f"dataset.root={image_root}", "--until"]
    variables = {"DPAR_HOME": str(tmp_path / "home"), "DPAR_DEVICE": "cpu"}
    with watched() as listening:
        runs = [
            hostile_folder.start_dpar(*arguments, last, folder=here, bin_folder=tmp_path, **variables, **more)
            for last, more in (("tokenizer", {"DPAR_PROCESSES": "2"}), ("dataset", {}))
        ]
        said = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert sorted(path.name for path in (tmp_path / "home").iterdir() if not path.name.startswith(".")) == [
        "dataset",
        "tokenizer",
    ]
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert any("stages.runtime.torchrun" in command for command in listening.processes)
    assert listening.of("stages.runtime.torchrun") == set()
    # A run does not wait for its server, so the shorter one may end before its server listens.
    assert len({command for command, _ in listening.found if PREFECT_APP in command}) in (1, 2)
    assert {address for _, address in listening.found} == {HOST}
