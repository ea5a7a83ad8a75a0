"""An entropy head that learns together with the model: what it leaves alone, and what becomes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.section import Section
from conf.train import TrainConfig
from pipeline.graph import STAGES
from stages.runtime.artifact import read_json
from stages.train import train
from stages.training.entropies import EntropyData

Run = Callable[[str, Section, dict[str, Path]], Path]
RUNTIME = RuntimeConfig(device="cpu", threads=2)
HEAD, WEIGHTS = "entropy_head.safetensors", "model.safetensors"


def joint(settings: Settings, **head: Any) -> TrainConfig:
    return TrainConfig.model_validate(settings.train.model_dump() | {"entropy_head": {"kind": "block"} | head})


def train_inputs(artifacts: dict[str, Path]) -> dict[str, Path]:
    return {name: artifacts[name] for name in STAGES["train"].inputs}


def metrics(artifact: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (artifact / "record/metrics.jsonl").read_text().splitlines()]


def heldout(artifact: Path) -> float:
    """The held-out loss that the training has measured at its end."""
    return metrics(artifact)[-1]["heldout_loss"]


@pytest.fixture(scope="module")
def joined(tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run) -> Path:
    """A model and a head whose gradient stops at the encoder."""
    return run_in_process("train", joint(tiny_settings), train_inputs(tiny_artifacts))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("kind", ["linear", "mlp", "block"])
def test_with_a_stopped_gradient_the_model_is_the_same_bit_for_bit(
    tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run, kind: str
) -> None:
    made = run_in_process("train", joint(tiny_settings, kind=kind, weight=3.0), train_inputs(tiny_artifacts))
    without = tiny_artifacts["train"]
    assert (made / WEIGHTS).read_bytes() == (without / WEIGHTS).read_bytes()
    assert heldout(made) == heldout(without)
    assert (made / HEAD).exists()
    assert not (without / HEAD).exists()


@pytest.mark.usefixtures("without_shape_checks")
def test_otherwise_the_encoder_learns_from_the_head(
    joined: Path, tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run
) -> None:
    moved = [
        run_in_process("train", joint(tiny_settings, stop_gradient=False, weight=weight), train_inputs(tiny_artifacts))
        for weight in (0.1, 1.0)
    ]
    assert len({(artifact / WEIGHTS).read_bytes() for artifact in (joined, *moved)}) == 3


def test_both_losses_are_logged_and_the_head_learns(joined: Path) -> None:
    steps = [line for line in metrics(joined) if "loss" in line]
    for line in steps:
        assert line["loss"] == pytest.approx(line["token_loss"] + line["entropy_error"], rel=1e-5)
        assert line["entropy_head_grad_norm"] > 0
    assert steps[-1]["entropy_error"] < steps[0]["entropy_error"]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.slow
def test_the_stage_takes_that_head_as_it_is_and_finds_its_threshold(
    joined: Path, tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run
) -> None:
    inputs = {name: tiny_artifacts[name] for name in STAGES["entropy_head"].inputs} | {"train": joined}
    config = tiny_settings.entropy_head.model_copy(update={"kind": "linear"})
    artifact = run_in_process("entropy_head", config, inputs)
    assert (artifact / HEAD).read_bytes() == (joined / HEAD).read_bytes()
    assert set(read_json(artifact / "thresholds.json")) == {"entropy_head", "own_entropy"}
    assert not (artifact / "record/metrics.jsonl").exists(), "nothing was trained"


@pytest.mark.usefixtures("without_shape_checks")
def test_interrupted_model_and_head_end_the_same_bit_for_bit(
    joined: Path,
    tiny_settings: Settings,
    tiny_artifacts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = EntropyData.training_batch

    def breaks(self: EntropyData, stream: Any, step: int, *given: Any) -> Any:
        if step == 6:
            raise KeyboardInterrupt
        return whole(self, stream, step, *given)

    given = (joint(tiny_settings), train_inputs(tiny_artifacts), tmp_path, RUNTIME)
    with monkeypatch.context() as patch:
        patch.setattr(EntropyData, "training_batch", breaks)
        with pytest.raises(KeyboardInterrupt):
            train(*given)
    assert list((tmp_path / "record/checkpoints").iterdir())
    torch.manual_seed(99)
    train(*given)
    for name in (WEIGHTS, HEAD):
        assert (tmp_path / name).read_bytes() == (joined / name).read_bytes(), name
    assert heldout(tmp_path) == heldout(joined)


def test_static_patches_have_nothing_for_a_head_to_say(
    tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run
) -> None:
    fields = tiny_settings.patch_index.model_dump()
    rule = fields | {"mode": "static", "threshold": None, "target_mean_length": None, "static_length": 2.0}
    index = run_in_process("patch_index", type(tiny_settings.patch_index).model_validate(rule), tiny_artifacts)
    made = run_in_process("train", joint(tiny_settings), train_inputs(tiny_artifacts) | {"patch_index": index})
    assert (made / WEIGHTS).exists()
    assert not (made / HEAD).exists()
