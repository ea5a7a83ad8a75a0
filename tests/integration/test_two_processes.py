"""Every stage that computes means the same on two gloo processes as on one, under a real torchrun."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from listening import watched
from odd_names import ODD_NAME

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.section import Section
from conf.train import JointHeadConfig
from pipeline.graph import STAGES, inputs_read
from pipeline.launch import launch
from pipeline.processes import HOST
from pipeline.project import DPAR
from stages.runtime.artifact import read_json, write_json
from stages.runtime.job import Job
from stages.stores.samples import SampleStore

pytestmark = pytest.mark.slow

Run = Callable[[str, Section, dict[str, Path]], Path]
TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def configs(tiny_settings: Settings) -> dict[str, tuple[str, Section]]:
    """The stage and the settings of each artifact that two processes make."""
    # Without dropout nothing is random but the order of samples, which does not depend on the processes.
    undropped = {"dropout": 0.0, "class_dropout_prob": 0.0}
    head = JointHeadConfig(kind="block", stop_gradient=False)
    # The BatchNorm of the discriminator depends on how many images a process holds.
    unjudged = {"adversarial_weight": 0.0}
    as_set = {name: (name, getattr(tiny_settings, name)) for name in ("tokenize", "entropy_map", "sample", "evaluate")}
    return (
        {"judged": ("tokenizer", tiny_settings.tokenizer)}
        | as_set
        | {
            "entropy_model": ("entropy_model", tiny_settings.entropy_model.model_copy(update={"dropout": 0.0})),
            "train": ("train", tiny_settings.train.model_copy(update=undropped)),
            "joint": ("train", tiny_settings.train.model_copy(update=undropped | {"entropy_head": head})),
            "tokenizer": ("tokenizer", tiny_settings.tokenizer.model_copy(update=unjudged)),
        }
    )


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory,
    image_root: Path,
    tiny_settings: Settings,
    tiny_artifacts: dict[str, Path],
    configs: dict[str, tuple[str, Section]],
) -> dict[str, Path]:
    """What one process group of two has made in turn, of the finished artifacts of the tiny run and its own samples."""
    folder = tmp_path_factory.mktemp("two") / ODD_NAME
    folder.mkdir()
    runtime = RuntimeConfig(home=folder, device="cpu", processes=2)
    made = {name: folder / name for name in configs}
    jobs = []
    for name, (stage, config) in configs.items():
        available = tiny_artifacts | {"sample": made["sample"], "images": image_root}
        read = [*inputs_read(STAGES[stage], tiny_settings.model_copy(update={stage: config}))]
        read += ["images"] * STAGES[stage].reads_images
        # On more threads, torch lays out a gradient of the tokenizer in another way, of which DDP warns.
        changed = {"threads": 1} if name == "judged" else {}
        job = Job(
            stage=stage,
            config=config.model_dump(mode="json"),
            inputs={source: available[source] for source in read},
            output=made[name],
            runtime=runtime.model_copy(update=changed).model_dump(mode="json"),
        )
        (made[name] / "record").mkdir(parents=True)
        job.write(folder / f"{name}.json")
        jobs.append(str(folder / f"{name}.json"))
    all_jobs = Job(
        stage="in_turn",
        config={"jobs": jobs},
        inputs={},
        output=folder / "in_turn",
        runtime=runtime.model_dump(mode="json"),
    )
    lock = os.open(folder / "lock", os.O_CREAT)
    with pytest.MonkeyPatch.context() as patch, watched() as listening:
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.setenv("OMP_NUM_THREADS", "1")  # where it is larger, the backward pass takes more threads all the same
        launch("in_turn", "stages_in_turn", all_jobs, runtime, code_root=DPAR.code_root, locks=(lock,), spmd=True)
    os.close(lock)
    write_json(folder / "listening.json", sorted(listening.found))
    return made


def test_they_open_no_port_to_other_machines(two: dict[str, Path]) -> None:
    """torchrun opens none at all. The ranks' gloo listens on loopback, where it takes tensors and no code."""
    found = read_json(two["train"].parent / "listening.json")
    assert [each for each in found if "stages.runtime.torchrun" in each[0]] == []
    assert {address for _, address in found} <= {HOST}


def metrics(artifact: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (artifact / "record/metrics.jsonl").read_text().splitlines()]


def content(artifact: Path) -> dict[str, bytes]:
    """All files but the record."""
    files = {path.relative_to(artifact): path for path in artifact.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in files.items() if name.parts[0] != "record"}


@pytest.mark.parametrize("name", ["tokenize", "entropy_map"])
def test_the_data_stages_make_the_same_bytes(two: dict[str, Path], tiny_artifacts: dict[str, Path], name: str) -> None:
    assert content(two[name]) == content(tiny_artifacts[name])


def test_samples_have_the_same_numbers_classes_tokens_and_features(
    two: dict[str, Path], run_in_process: Run, tiny_settings: Settings, tiny_artifacts: dict[str, Path]
) -> None:
    together, alone = (SampleStore.open(path / "samples.zarr") for path in (two["sample"], tiny_artifacts["sample"]))
    assert np.array_equal(together.labels, alone.labels)
    assert np.array_equal(together.tokens, alone.tokens)
    assert np.array_equal(together.patch_starts, alone.patch_starts)
    evaluated = run_in_process("evaluate", tiny_settings.evaluate, tiny_artifacts | {"sample": two["sample"]})
    with np.load(two["evaluate"] / "features.npz") as found, np.load(evaluated / "features.npz") as expected:
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ["entropy_model", "train", "joint"])
def test_training_takes_the_same_steps(
    two: dict[str, Path],
    run_in_process: Run,
    configs: dict[str, tuple[str, Section]],
    tiny_artifacts: dict[str, Path],
    name: str,
) -> None:
    alone, together = metrics(run_in_process(*configs[name], tiny_artifacts)), metrics(two[name])
    assert [line["step"] for line in together] == [line["step"] for line in alone]
    assert together[-1]["heldout_loss"] == pytest.approx(alone[-1]["heldout_loss"], abs=1e-4)


def test_the_tokenizer_trains_on_two_processes_as_on_one(
    two: dict[str, Path],
    run_in_process: Run,
    configs: dict[str, tuple[str, Section]],
    tiny_artifacts: dict[str, Path],
) -> None:
    alone = metrics(run_in_process(*configs["tokenizer"], tiny_artifacts))
    assert metrics(two["tokenizer"])[-1]["psnr"] == pytest.approx(alone[-1]["psnr"], abs=0.05)


def test_the_discriminator_joins_on_two_processes(two: dict[str, Path]) -> None:
    norms = [line["discriminator_grad_norm"] for line in metrics(two["judged"]) if "loss" in line]
    assert [norm > 0 for norm in norms] == [False, False, True, True]
    said = (two["judged"].parent / "in_turn/record/log.txt").read_text().lower()
    assert "warn" not in said.partition("training without a discriminator")[0]
