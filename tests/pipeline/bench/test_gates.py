import math

import pytest

from pipeline.bench import gates as bench
from pipeline.bench.gates import demo_gates
from stages.runtime.errors import ArtifactError

LEARNED = {
    "entropy_model_heldout_loss": 4.0,
    "entropy_model_unigram_loss": 5.0,
    "train_heldout_loss": 3.9,
    "train_unigram_loss": 5.0,
    "fd_lite0_heldout": 0.1,
    "fd_lite0_reconstruction": 0.2,
    "fd_lite0_samples": 0.3,
    "fd_lite0_marginals": 0.6,
    "fd_lite0_random": 0.9,
    "ratio_to_marginals": 0.5,
    "ratio_to_random": 0.33,
    "patch_index_mean_length": 2.0,
    "sample_mean_patch_length": 1.9,
    "entropy_head_correlation": 0.94,
    "entropy_head_agreement": 0.87,
}


def test_models_that_learned_meet_every_gate() -> None:
    assert all(gate.met for gate in demo_gates(LEARNED))


@pytest.mark.parametrize(
    ("name", "value", "gate"),
    [
        ("entropy_model_heldout_loss", 5.0, "entropy_model_heldout_loss < entropy_model_unigram_loss"),
        ("train_heldout_loss", 5.1, "train_heldout_loss < train_unigram_loss"),
        ("train_heldout_loss", math.nan, "train_heldout_loss < train_unigram_loss"),
        ("fd_lite0_heldout", 0.25, "fd_lite0_heldout < fd_lite0_reconstruction"),
        ("fd_lite0_reconstruction", 0.35, "fd_lite0_reconstruction < fd_lite0_samples"),
        ("fd_lite0_samples", 0.65, "fd_lite0_samples < fd_lite0_marginals"),
        ("fd_lite0_random", 0.59, "fd_lite0_marginals < fd_lite0_random"),
        ("ratio_to_marginals", 0.8, "ratio_to_marginals < 0.8"),
        ("ratio_to_random", 0.71, "ratio_to_random < 0.7"),
        ("patch_index_mean_length", 1.4, "patch_index_mean_length > 1.5"),
        ("patch_index_mean_length", 2.6, "patch_index_mean_length < 2.5"),
        ("sample_mean_patch_length", 1.2, "sample_mean_patch_length > 1.5"),
        ("entropy_head_correlation", 0.7, "entropy_head_correlation > 0.9"),
        ("entropy_head_agreement", 0.8, "entropy_head_agreement > 0.85"),
    ],
)
def test_each_gate_is_missed_by_its_own_number(name: str, value: float, gate: str) -> None:
    missed = [found for found in demo_gates(LEARNED | {name: value}) if not found.met]
    assert [found.name for found in missed] == [gate]


def test_numbers_that_are_not_there_are_named() -> None:
    with pytest.raises(ArtifactError, match="evaluate has no fd_lite0_samples, train_unigram_loss"):
        demo_gates({name: LEARNED[name] for name in LEARNED.keys() - {"train_unigram_loss", "fd_lite0_samples"}})


@pytest.mark.slow
def test_wall_time_is_that_of_fresh_processes_and_a_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench._median_seconds(["--help"], repeats=1) > 0
    with pytest.raises(ArtifactError, match=r"dpar status --preset nosuch ended with exit code 2: .*nosuch"):
        bench._median_seconds(["status", "--preset", "nosuch"], repeats=1)


@pytest.mark.parametrize(("seconds", "met"), [(0.5, [True, True]), (0.95, [False, True]), (2.0, [False, False])])
def test_waiting_times_have_their_own_bounds(seconds: float, met: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def measure(arguments: list[str], repeats: int) -> float:
        asked.append(arguments)
        return seconds

    monkeypatch.setattr(bench, "_median_seconds", measure)
    assert [gate.met for gate in bench.cli_gates(["runtime.home=there"])] == met
    shared = ["--preset", "demo", "--set", "runtime.home=there"]
    assert asked == [["status", *shared], ["run", *shared]]
