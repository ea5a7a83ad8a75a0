import json
import math
from pathlib import Path

import pytest

from pipeline import bench
from pipeline.bench import demo_gates
from stages.errors import ArtifactError

LEARNED = {
    "entropy_model": {"heldout_loss": 4.0, "unigram_loss": 5.0},
    "patch_index": {"mean_length": 2.0},
    "train": {"heldout_loss": 3.9, "unigram_loss": 5.0},
    "sample": {"sample_mean_patch_length": 1.9},
    "evaluate": {
        "fd_lite0_heldout": 0.1,
        "fd_lite0_reconstruction": 0.2,
        "fd_lite0": 0.3,
        "fd_lite0_marginals": 0.6,
        "fd_lite0_random": 0.9,
    },
}


def artifacts(home: Path, **changes: dict[str, float]) -> dict[str, Path]:
    for stage, metrics in LEARNED.items():
        (home / stage).mkdir()
        (home / stage / "metrics.json").write_text(json.dumps(metrics | changes.get(stage, {})))
    return {stage: home / stage for stage in LEARNED}


def missed(found: dict[str, Path]) -> list[str]:
    return [gate.name for gate in demo_gates(found) if not gate.met]


def test_models_that_learned_meet_every_gate(tmp_path: Path) -> None:
    gates = demo_gates(artifacts(tmp_path))
    assert all(gate.met for gate in gates)
    values = {gate.name: gate.value for gate in gates}
    assert values["fd_lite0 / fd_lite0_marginals"] == pytest.approx(0.5)
    assert values["fd_lite0 / fd_lite0_random"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("stage", "change", "gate"),
    [
        ("entropy_model", {"heldout_loss": 5.0}, "entropy_model: held-out loss"),
        ("train", {"heldout_loss": 5.1}, "train: held-out loss"),
        ("train", {"heldout_loss": math.nan}, "train: held-out loss"),
        ("evaluate", {"fd_lite0_heldout": 0.25}, "fd_lite0_heldout < fd_lite0_reconstruction"),
        ("evaluate", {"fd_lite0_reconstruction": 0.35}, "fd_lite0_reconstruction < fd_lite0"),
        ("evaluate", {"fd_lite0_random": 0.59}, "fd_lite0_marginals < fd_lite0_random"),
        ("evaluate", {"fd_lite0": 0.5, "fd_lite0_random": 2.0}, "fd_lite0 / fd_lite0_marginals"),
        ("evaluate", {"fd_lite0": 0.47, "fd_lite0_random": 0.65}, "fd_lite0 / fd_lite0_random"),
        ("patch_index", {"mean_length": 1.4}, "mean patch length"),
        ("patch_index", {"mean_length": 2.6}, "mean patch length"),
        ("sample", {"sample_mean_patch_length": 1.2}, "share of positions"),
    ],
)
def test_each_gate_is_missed_by_its_own_number(tmp_path: Path, stage: str, change: dict[str, float], gate: str) -> None:
    found = missed(artifacts(tmp_path, **{stage: change}))
    assert len(found) == 1
    assert found[0].startswith(gate)


def test_a_number_that_is_not_there_is_named(tmp_path: Path) -> None:
    found = artifacts(tmp_path)
    (found["train"] / "metrics.json").write_text('{"heldout_loss": 1.0}')
    with pytest.raises(ArtifactError, match=r"train/metrics\.json has no unigram_loss"):
        demo_gates(found)


def test_wall_time_is_that_of_fresh_processes_and_a_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench._median_seconds(["--help"], repeats=1) > 0
    with pytest.raises(ArtifactError, match=r"dpar status --preset nosuch ended with 2: .*nosuch"):
        bench._median_seconds(["status", "--preset", "nosuch"], repeats=1)
