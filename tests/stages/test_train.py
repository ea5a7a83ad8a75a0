"""Stage train: the families, NPP's levels and resume, imported transformers, and that all of them can be sampled."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.section import Section
from conf.train import TrainConfig
from models.gpt import GPT
from stages.families import load_model
from stages.runtime.artifact import file_sha256, read_json
from stages.runtime.distributed import World
from stages.runtime.errors import InputError
from stages.stores.samples import SampleStore
from stages.stores.tokens import TokenStore
from stages.train import train
from stages.training.data import GPTObjective, TokenData
from stages.training.meter import MEASURED
from stages.training.next_patch import NextPatchData
from stages.training.validation import heldout_loss

Run = Callable[[str, Section, dict[str, Path]], Path]
METRICS = "metrics.json"
SIZE = {"dim": 32, "num_layers": 2, "num_heads": 2}
RUNTIME = RuntimeConfig(device="cpu", threads=1)


def config(settings: Settings, family: str, **changes: Any) -> TrainConfig:
    training = settings.train.training.model_dump() | {"decay": "linear_tail"} | changes.pop("training", {})
    return TrainConfig.model_validate({"family": family, "model": SIZE, "training": training} | changes)


def train_inputs(artifacts: dict[str, Path]) -> dict[str, Path]:
    return {name: artifacts[name] for name in ("tokenize", "patch_index")}


def lines(artifact: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (artifact / "record/metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in found]


@pytest.fixture(scope="module")
def npp(tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run) -> Path:
    """A finished NPP artifact: four steps in blocks of 2 x 2, four on single tokens."""
    return run_in_process("train", config(tiny_settings, "npp"), train_inputs(tiny_artifacts))


def test_npp_goes_from_blocks_to_tokens_and_says_so(npp: Path) -> None:
    steps = [line for line in lines(npp) if "loss" in line]
    assert [(line["step"], line["patch_side"]) for line in steps] == [(2, 2), (4, 2), (6, 1), (8, 1)]
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_npps_heldout_loss_is_llamagens(
    npp: Path, tiny_settings: Settings, tiny_artifacts: dict[str, Path], draw_view: Run
) -> None:
    model = load_model(npp)
    assert isinstance(model, GPT)
    store = TokenStore.open(tiny_artifacts["tokenize"] / "tokens.zarr")
    with torch.no_grad():
        expected = heldout_loss(TokenData(store), GPTObjective(model), World(0, 1, torch.device("cpu")))
    metrics = read_json(draw_view("train", config(tiny_settings, "npp"), tiny_artifacts | {"train": npp}) / METRICS)
    assert metrics == expected | {"unigram_loss": pytest.approx(unigram_loss(store), rel=1e-9)}


def unigram_loss(store: TokenStore) -> float:
    """Of a model that knows how often each code stands at each place of a first view, at its best smoothing."""
    images, losses = np.arange(len(store)), []
    tokens, of_training = store.fetch(images, np.zeros_like(images)), images < store.num_train
    for smoothing in (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0):
        each = []
        for place in range(store.num_tokens):
            seen = Counter(tokens[of_training, place].tolist())
            total = seen.total() + smoothing * store.codebook_size
            each += [-math.log((seen[token] + smoothing) / total) for token in tokens[~of_training, place].tolist()]
        losses.append(sum(each) / len(each))
    return min(losses)


@pytest.mark.parametrize("killed_at", [3, 6])
def test_npp_interrupted_in_either_level_ends_the_same_bit_for_bit(
    npp: Path,
    tiny_settings: Settings,
    tiny_artifacts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
) -> None:
    settings = config(tiny_settings, "npp", training={"checkpoint_every": 2})
    whole = NextPatchData.training_batch

    def breaks(self: NextPatchData, stream: Any, step: int, *given: Any) -> Any:
        if step == killed_at:
            raise KeyboardInterrupt
        return whole(self, stream, step, *given)

    with monkeypatch.context() as patch:
        patch.setattr(NextPatchData, "training_batch", breaks)
        with pytest.raises(KeyboardInterrupt):
            train(settings, train_inputs(tiny_artifacts), tmp_path, RUNTIME)
    done = max(line["step"] for line in lines(tmp_path))
    assert 0 < done < killed_at + 1
    train(settings, train_inputs(tiny_artifacts), tmp_path, RUNTIME)
    assert (tmp_path / "model.safetensors").read_bytes() == (npp / "model.safetensors").read_bytes()
    assert [line for line in lines(tmp_path) if "loss" in line] == [line for line in lines(npp) if "loss" in line]
    assert lines(tmp_path)[-1] == lines(npp)[-1], "its held-out loss"


def test_a_schedule_of_one_level_is_llamagen(
    tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run
) -> None:
    weights = [
        (run_in_process("train", settings, train_inputs(tiny_artifacts)) / "model.safetensors").read_bytes()
        for settings in (config(tiny_settings, "npp", npp={"levels": 1}), config(tiny_settings, "llamagen"))
    ]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_weights_of_npp_and_llamagen_are_interchangeable_and_sample_the_same(
    npp: Path, tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run
) -> None:
    imported = run_in_process(
        "train",
        config(tiny_settings, "llamagen", source="checkpoint", checkpoint=npp / "model.safetensors", dropout=0.7),
        {"tokenize": tiny_artifacts["tokenize"]},
    )
    assert (imported / "model.safetensors").read_bytes() == (npp / "model.safetensors").read_bytes()
    baseline = tiny_settings.sample.model_copy(update={"boundaries": None})
    sampled = [
        SampleStore.open(run_in_process("sample", baseline, tiny_artifacts | {"train": artifact}) / "samples.zarr")
        for artifact in (npp, imported)
    ]
    assert np.array_equal(sampled[0].tokens, sampled[1].tokens)
    assert sampled[0].patch_starts.all()  # a token a step


def test_an_imported_transformer_is_scored_and_known_by_its_files_digest(
    npp: Path, tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run, tmp_path: Path
) -> None:
    state = load_model(npp).state_dict()
    torch.save({"model": state}, tmp_path / "c2i.pt")
    artifacts = [
        run_in_process(
            "train",
            config(tiny_settings, "llamagen", source="checkpoint", checkpoint=tmp_path / "c2i.pt", **changes),
            {"tokenize": tiny_artifacts["tokenize"]},
        )
        for changes in ({}, {"dropout": 0.5, "seed": 3, "class_dropout_prob": 0.9, "training": {"steps": 99}})
    ]
    assert read_json(artifacts[0] / "record/source.json")["sha256"] == file_sha256(tmp_path / "c2i.pt")
    (scored,) = lines(artifacts[0])
    assert (scored["step"], scored["heldout_loss"]) == (0, lines(npp)[-1]["heldout_loss"])
    names = sorted(path.name for path in artifacts[0].iterdir() if path.is_file())
    assert names == ["config.json", "model.safetensors"]
    for name in names:  # what is in no key changes no byte
        assert (artifacts[0] / name).read_bytes() == (artifacts[1] / name).read_bytes()


def test_a_dpars_weights_are_no_llamagens(
    tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run
) -> None:
    settings = config(
        tiny_settings, "llamagen", source="checkpoint", checkpoint=tiny_artifacts["train"] / "model.safetensors"
    )
    with pytest.raises(InputError, match="holds a DPAR model, expected LlamaGen's transformer"):
        run_in_process("train", settings, {"tokenize": tiny_artifacts["tokenize"]})


@pytest.mark.slow
def test_an_imported_dpar_equals_the_trained_one_and_samples_the_same(
    tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run, tmp_path: Path
) -> None:
    trained = tiny_artifacts["train"]
    state = {f"module.{name}": tensor for name, tensor in load_model(trained).state_dict().items()}
    torch.save({"model": state}, tmp_path / "dpar.pt")
    changes = {"source": "checkpoint", "checkpoint": tmp_path / "dpar.pt", "entropy_head": {"kind": "none"}}
    settings = TrainConfig.model_validate(tiny_settings.train.model_dump() | changes)
    imported = run_in_process("train", settings, tiny_artifacts)
    assert load_file(imported / "model.safetensors").keys() == load_file(trained / "model.safetensors").keys()
    assert (imported / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert read_json(imported / "record/source.json")["stripped_prefix"] == "module."
    assert lines(imported)[0]["heldout_loss"] == lines(trained)[-1]["heldout_loss"]
    few = tiny_settings.sample.model_copy(update={"num_samples": 4})
    made = [run_in_process("sample", few, tiny_artifacts | {"train": model}) for model in (imported, trained)]
    tokens = [SampleStore.open(artifact / "samples.zarr").tokens for artifact in made]
    assert np.array_equal(tokens[0], tokens[1])


@pytest.mark.slow
def test_a_model_without_a_null_class_is_sampled_without_guidance_alone(
    npp: Path, tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run, tmp_path: Path
) -> None:
    state, table = dict(load_model(npp).state_dict()), "cls_embedding.embedding_table.weight"
    torch.save({"ema": state | {table: state[table][:-1].clone()}}, tmp_path / "c2i.pt")
    settings = config(tiny_settings, "llamagen", source="checkpoint", checkpoint=tmp_path / "c2i.pt", weights="ema")
    imported = run_in_process("train", settings, {"tokenize": tiny_artifacts["tokenize"]})
    baseline = tiny_settings.sample.model_copy(update={"boundaries": None, "num_samples": 4})
    with pytest.raises(InputError, match=r"cfg_scale is .* without class dropout.*set sample.cfg_scale=1$"):
        run_in_process("sample", baseline, tiny_artifacts | {"train": imported})
    plain = baseline.model_copy(update={"cfg_scale": 1.0})
    made = [run_in_process("sample", plain, tiny_artifacts | {"train": model}) for model in (imported, npp)]
    tokens = [SampleStore.open(artifact / "samples.zarr").tokens for artifact in made]
    assert np.array_equal(tokens[0], tokens[1])
