"""Every stage that computes means the same on two gloo processes as on one, under a real torchrun."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.section import Section
from conf.train import JointHeadConfig
from pipeline.graph import STAGES, inputs_read
from pipeline.launch import launch
from pipeline.project import DPAR
from stages.runtime.job import Job
from stages.stores.entropies import EntropyStore
from stages.stores.samples import SampleStore
from stages.stores.tokens import TokenStore

pytestmark = pytest.mark.slow

Run = Callable[[str, Section, dict[str, Path]], Path]


@pytest.fixture
def run_on_two(tmp_path: Path, image_root: Path, tiny_settings: Settings, tiny_artifacts: dict[str, Path]) -> Run:
    """Run a stage as its process group of two, on what it reads of the finished artifacts of the tiny run."""

    def run(name: str, config: Section, changed: dict[str, Path]) -> Path:
        stage, runtime = STAGES[name], RuntimeConfig(home=tmp_path, device="cpu", processes=2)
        read = inputs_read(stage, tiny_settings.model_copy(update={name: config}))
        inputs = {source: (tiny_artifacts | changed)[source] for source in read}
        if stage.reads_images:
            inputs["images"] = image_root
        output = tmp_path / name
        job = Job(
            stage=name,
            config=config.model_dump(mode="json"),
            inputs=inputs,
            output=output,
            runtime=runtime.model_dump(mode="json"),
        )
        lock = os.open(tmp_path / "lock", os.O_CREAT)
        launch(name, stage.entry[0], job, runtime, code_root=DPAR.code_root, locks=(lock,), spmd=stage.spmd)
        os.close(lock)
        return output

    return run


def metrics(artifact: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (artifact / "record/metrics.jsonl").read_text().splitlines()]


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


def test_samples_have_the_same_numbers_classes_tokens_and_features(
    run_on_two: Run, run_in_process: Run, tiny_settings: Settings, tiny_artifacts: dict[str, Path]
) -> None:
    output = run_on_two("sample", tiny_settings.sample, {})
    two, one = (SampleStore.open(path / "samples.zarr") for path in (output, tiny_artifacts["sample"]))
    assert np.array_equal(two.labels, one.labels)
    assert np.array_equal(two.tokens, one.tokens)
    assert np.array_equal(two.patch_starts, one.patch_starts)
    evaluated = [
        run("evaluate", tiny_settings.evaluate, tiny_artifacts | {"sample": output})
        for run in (run_on_two, run_in_process)
    ]
    with np.load(evaluated[0] / "features.npz") as two_, np.load(evaluated[1] / "features.npz") as one_:
        assert set(two_) == set(one_)
        for name in one_:
            np.testing.assert_allclose(two_[name], one_[name], rtol=1e-3, atol=1e-4, err_msg=name)


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
    alone = metrics(run_in_process(name, config, tiny_artifacts))
    together = metrics(run_on_two(name, config, {}))
    assert [line["step"] for line in together] == [line["step"] for line in alone]
    assert together[-1]["heldout_loss"] == pytest.approx(alone[-1]["heldout_loss"], abs=1e-4)


def test_the_tokenizer_trains_on_two_processes_as_on_one(
    run_on_two: Run, run_in_process: Run, tiny_settings: Settings, tiny_artifacts: dict[str, Path]
) -> None:
    # Without the discriminator, whose BatchNorm depends on how many images a process holds.
    config = tiny_settings.tokenizer.model_copy(update={"adversarial_weight": 0.0})
    alone = metrics(run_in_process("tokenizer", config, tiny_artifacts))
    together = metrics(run_on_two("tokenizer", config, {}))
    assert together[-1]["psnr"] == pytest.approx(alone[-1]["psnr"], abs=0.05)


def test_the_discriminator_joins_on_two_processes(run_on_two: Run, tiny_settings: Settings) -> None:
    output = run_on_two("tokenizer", tiny_settings.tokenizer, {})
    norms = [line["discriminator_grad_norm"] for line in metrics(output) if "loss" in line]
    assert [norm > 0 for norm in norms] == [False, False, True, True]
    assert "warn" not in (output / "record/log.txt").read_text().lower()
