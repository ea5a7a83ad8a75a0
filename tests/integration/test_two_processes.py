"""Every stage that computes means the same on two gloo processes as on one, under a real torchrun."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conf.schema import RuntimeConfig, Settings
from conf.section import Section
from conf.train import JointHeadConfig
from pipeline.graph import STAGES
from pipeline.launch import launch
from pipeline.project import DPAR
from stages.runtime.artifact import read_json
from stages.runtime.job import Job
from stages.stores.entropies import EntropyStore
from stages.stores.samples import SampleStore
from stages.stores.tokens import TokenStore

Run = Callable[[str, Section, dict[str, Path]], Path]


@pytest.fixture
def run_on_two(tmp_path: Path, image_root: Path, tiny_artifacts: dict[str, Path]) -> Run:
    """Run a stage as its process group of two, on the finished artifacts of the tiny run."""

    def run(name: str, config: Section, changed: dict[str, Path]) -> Path:
        stage, runtime = STAGES[name], RuntimeConfig(home=tmp_path, device="cpu", processes=2)
        inputs = {source: (tiny_artifacts | changed)[source] for source in stage.inputs} | {"images": image_root}
        output = tmp_path / name
        job = Job(
            stage=name,
            config=config.model_dump(mode="json"),
            inputs=inputs,
            output=output,
            runtime=runtime.model_dump(mode="json"),
        )
        lock = os.open(tmp_path / "lock", os.O_CREAT)
        launch(name, stage.entry[0], job, runtime, code_root=DPAR.code_root, locks=(lock,), spmd=True)
        os.close(lock)
        return output

    return run


def test_the_data_stages_make_the_same_bytes(
    run_on_two: Run, tiny_settings: Settings, tiny_artifacts: dict[str, Path]
) -> None:
    tokens = TokenStore.open(run_on_two("tokenize", tiny_settings.tokenize, {}) / "tokens.zarr")
    assert tokens.digest == TokenStore.of(tiny_artifacts).digest
    entropies = EntropyStore.open(run_on_two("entropy_map", tiny_settings.entropy_map, {}) / "entropies.zarr")
    alone = EntropyStore.of(tiny_artifacts)
    rows = np.arange(len(alone))
    np.testing.assert_allclose(
        entropies.fetch(rows, np.zeros_like(rows)), alone.fetch(rows, np.zeros_like(rows)), atol=1e-5
    )


def test_samples_have_the_same_numbers_classes_and_tokens(
    run_on_two: Run, tiny_settings: Settings, tiny_artifacts: dict[str, Path]
) -> None:
    output = run_on_two("sample", tiny_settings.sample, {})
    two, one = (SampleStore.open(path / "samples.zarr") for path in (output, tiny_artifacts["sample"]))
    assert np.array_equal(two.labels, one.labels)
    assert np.array_equal(two.tokens, one.tokens)
    assert np.array_equal(two.patch_starts, one.patch_starts)
    scores = read_json(run_on_two("evaluate", tiny_settings.evaluate, {"sample": output}) / "metrics.json")
    assert scores["num_samples"] == 12


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("entropy_model", {}),
        ("train", {"class_dropout_prob": 0.0}),
        ("train", {"class_dropout_prob": 0.0, "entropy_head": JointHeadConfig(kind="block", stop_gradient=False)}),
    ],
)
def test_training_takes_the_same_steps(
    run_on_two: Run,
    run_in_process: Run,
    tiny_settings: Settings,
    tiny_artifacts: dict[str, Path],
    name: str,
    changes: dict[str, object],
) -> None:
    # Without dropout nothing is random but the order of samples, which does not depend on the processes.
    config = getattr(tiny_settings, name).model_copy(update={"dropout": 0.0} | changes)
    inputs = {source: tiny_artifacts[source] for source in STAGES[name].inputs}
    alone = read_json(run_in_process(name, config, inputs) / "metrics.json")
    together = read_json(run_on_two(name, config, {}) / "metrics.json")
    assert together["heldout_loss"] == pytest.approx(alone["heldout_loss"], abs=1e-4)
    assert together["unigram_loss"] == alone["unigram_loss"]


def test_the_tokenizer_trains_on_two_processes_as_on_one(
    run_on_two: Run, run_in_process: Run, tiny_settings: Settings, tiny_artifacts: dict[str, Path]
) -> None:
    # Without the discriminator, whose BatchNorm depends on how many images a process holds.
    config = tiny_settings.tokenizer.model_copy(update={"adversarial_weight": 0.0})
    alone = run_in_process("tokenizer", config, {"dataset": tiny_artifacts["dataset"]})
    together = run_on_two("tokenizer", config, {})
    scores = [read_json(path / "metrics.json")["psnr"] for path in (alone, together)]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


def test_the_discriminator_joins_on_two_processes(run_on_two: Run, tiny_settings: Settings) -> None:
    output = run_on_two("tokenizer", tiny_settings.tokenizer, {})
    lines = [json.loads(line) for line in (output / "record/metrics.jsonl").read_text().splitlines()]
    norms = [line["discriminator_grad_norm"] for line in lines if "loss" in line]
    assert [norm > 0 for norm in norms] == [False, False, True, True]
    assert "warn" not in (output / "record/log.txt").read_text().lower()
