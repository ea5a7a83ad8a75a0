"""The batch script as text: it is valid bash, asks for what the settings say, and survives odd paths."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from conf.load import SettingsError, load_settings
from conf.runtime import RuntimeConfig, SlurmConfig
from pipeline.launchers.commands import Process
from pipeline.launchers.sbatch import script
from stages.runtime.job import Job


def rendered(folder: Path, **settings: Any) -> str:
    runtime = RuntimeConfig(home=folder, **settings)
    job = Job(stage="train", config={}, inputs={}, output=folder / "train-1", runtime={})
    process = Process(
        name="train",
        module="stages.train",
        job=job,
        code_root=folder,
        nodes=runtime.nodes,
        per_node=runtime.processes,
    )
    record = process.record
    return script(process, runtime, name="dpar-1", probe=record / "probe", token="t0k3n", exit_file=record / "exit")


def options(text: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}


def test_the_settings_become_options(tmp_path: Path) -> None:
    slurm = SlurmConfig(partition="gpu", account="lab", hours=1.5, options=("--exclusive", "--qos=long"))
    found = options(rendered(tmp_path, nodes=4, processes=8, gpus_per_node=8, threads=3, slurm=slurm))
    assert found >= {
        "--nodes=4",
        "--ntasks-per-node=1",
        "--cpus-per-task=24",
        "--gpus-per-node=8",
        "--partition=gpu",
        "--account=lab",
        "--time=90",
        "--exclusive",
        "--qos=long",
        "--requeue",
        "--signal=B:USR1@300",
    }


def test_what_is_not_set_is_left_to_the_cluster(tmp_path: Path) -> None:
    names = {option.partition("=")[0] for option in options(rendered(tmp_path))}
    assert not names & {"--partition", "--account", "--time", "--gpus-per-node"}


@pytest.mark.parametrize("name", ["plain", "with space", "quote'd", 'double"d', "dollar$HOME", "per%cent", "back`tick"])
def test_any_path_gives_valid_bash(tmp_path: Path, name: str) -> None:
    text = rendered(tmp_path / name, nodes=2, processes=2)
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_several_machines_meet_at_the_first_and_one_machine_opens_no_port(tmp_path: Path) -> None:
    several, one = (rendered(tmp_path, nodes=nodes, processes=2) for nodes in (2, 1))
    assert '--rdzv-endpoint="$RENDEZVOUS"' in several
    assert "DPAR_INIT_METHOD" not in several
    assert "store_type=file" in one
    assert "export DPAR_INIT_METHOD=file://" in one


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("slurm.partition='gpu; rm'", r"slurm\.partition"),
        (r'slurm.options=["--a\n#SBATCH --b"]', r"slurm\.options"),
        ("slurm.options=[exclusive]", r"slurm\.options"),
        ("slurm.hours=0.1", r"slurm\.hours.*greater than or equal to 0.25"),
        ("slurm.time=3", r"slurm\.time: unknown setting"),
        ("nodes=0", "nodes.*greater than 0"),
    ],
)
def test_what_cannot_be_an_option_is_refused(override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings("tiny", None, [f"runtime.{override}"])


def test_variables_and_overrides_meet_in_one_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPAR_SLURM__PARTITION", "gpu")
    monkeypatch.setenv("DPAR_SLURM__OPTIONS", '["--exclusive"]')
    slurm = load_settings("tiny", None, ["runtime.slurm.hours=2"])[1].slurm
    assert slurm == SlurmConfig(partition="gpu", hours=2, options=("--exclusive",))
