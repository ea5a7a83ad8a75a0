"""Stage entropy_head: thresholds that give the index's mean length, a head trained alone, and nothing for rivals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.schema import EntropyHeadConfig, RuntimeConfig, Section, Settings
from models.dpar import DPAR, pack_patches
from models.gpt import token_entropy
from models.patching import PatchRule
from stages.artifact import read_json, write_json
from stages.entropy_head import entropy_head
from stages.own_entropies import StoredTokens
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenStore
from stages.thresholds import EntropySample
from stages.training.entropy_head import EntropyData
from stages.weights import load_entropy_head, load_model

Run = Callable[[str, Section, dict[str, Path]], Path]
RUNTIME = RuntimeConfig(device="cpu", threads=2)
INPUTS = ("tokenizer", "tokenize", "entropy_map", "patch_index", "train")


def config(settings: Settings, **changes: Any) -> EntropyHeadConfig:
    return EntropyHeadConfig(**settings.entropy_head.model_dump() | changes)


@pytest.fixture(scope="module")
def trained_alone(tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run) -> Path:
    """An artifact whose head was trained on the finished model."""
    return run_in_process("entropy_head", config(tiny_settings, source="train", kind="mlp"), tiny_artifacts)


def test_each_threshold_gives_the_mean_length_of_the_index_on_its_own_entropies(
    tiny_artifacts: dict[str, Path],
) -> None:
    artifact, saved = tiny_artifacts["entropy_head"], read_json(tiny_artifacts["patch_index"] / "rule.json")
    thresholds = read_json(artifact / "thresholds.json")
    assert set(thresholds) == {"entropy_head", "own_entropy"}
    with np.load(artifact / "entropies.npz") as entropies:
        for name, threshold in thresholds.items():
            sample = EntropySample.of_rows(entropies[name], 64)
            found = sample.mean_length(PatchRule(threshold, saved["max_length"], saved["row_boundary"], 8))
            assert found == pytest.approx(saved["mean_length"], abs=0.01), name
            assert threshold != saved["threshold"]
            assert (entropies[name][:, 0] == np.float32(np.log(64))).all()


def test_the_numbers_are_of_both_sources_and_the_picture_is_there(tiny_artifacts: dict[str, Path]) -> None:
    numbers = read_json(tiny_artifacts["entropy_head"] / "metrics.json")
    for source in ("entropy_head", "own_entropy"):
        assert -1 <= numbers[f"{source}_correlation"] <= 1
        assert 0 < numbers[f"{source}_agreement"] <= 1
        assert 1 < numbers[f"{source}_mean_length"] < 4
    assert (tiny_artifacts["entropy_head"] / "patches.png").stat().st_size > 0
    near = read_json(tiny_artifacts["sample"] / "metrics.json")
    assert near["boundary_correlation"] == numbers["entropy_head_correlation"]
    assert read_json(tiny_artifacts["sample"] / "boundaries.json")["source"] == "entropy_head"


def test_the_head_is_the_models_own(tiny_artifacts: dict[str, Path]) -> None:
    model, head = load_model(tiny_artifacts["train"]), load_entropy_head(tiny_artifacts["entropy_head"])
    assert isinstance(model, DPAR)
    assert model.entropy_head is not None
    assert head is not None
    for name, weight in model.entropy_head.state_dict().items():
        assert torch.equal(head.state_dict()[name], weight)


def test_a_head_trained_alone_is_another_and_the_model_says_the_same(
    trained_alone: Path, tiny_artifacts: dict[str, Path]
) -> None:
    head = load_entropy_head(trained_alone)
    assert head is not None
    assert head.hidden is not None
    assert head.weight.abs().max() > 0
    artifacts = (trained_alone, tiny_artifacts["entropy_head"])
    own = [read_json(artifact / "thresholds.json")["own_entropy"] for artifact in artifacts]
    assert own[0] == own[1]


def test_training_alone_interrupted_ends_the_same_bit_for_bit(
    trained_alone: Path,
    tiny_settings: Settings,
    tiny_artifacts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, steps = EntropyData.training_batch, list[int]()

    def breaks(self: EntropyData, stream: Any, step: int, world: Any) -> Any:
        if not steps and step == 6:
            steps.append(step)
            raise KeyboardInterrupt
        steps.extend([step] if steps else [])
        return whole(self, stream, step, world)

    monkeypatch.setattr(EntropyData, "training_batch", breaks)
    given = (config(tiny_settings, source="train", kind="mlp"), {name: tiny_artifacts[name] for name in INPUTS})
    with pytest.raises(KeyboardInterrupt):
        entropy_head(*given, tmp_path, RUNTIME)
    entropy_head(*given, tmp_path, RUNTIME)
    assert steps == [6, 4, 5, 6, 7], "it goes on from the checkpoint"
    made = sorted(path.name for path in trained_alone.iterdir() if path.is_file())
    assert "entropy_head.safetensors" in made
    assert len(made) == 6
    for name in made:
        assert (tmp_path / name).read_bytes() == (trained_alone / name).read_bytes(), name


def test_a_static_index_and_a_rival_have_no_source(
    tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run, tmp_path: Path
) -> None:
    write_json(tmp_path / "static/rule.json", {"mode": "static", "static_length": 2.0})
    fields = {"family": "llamagen", "model": {"dim": 32, "num_layers": 1, "num_heads": 2}}
    rival = type(tiny_settings.train)(**fields, training=tiny_settings.train.training)
    for changed in (
        {"patch_index": tmp_path / "static"},
        {"train": run_in_process("train", rival, {"tokenize": tiny_artifacts["tokenize"]})},
    ):
        output = run_in_process("entropy_head", tiny_settings.entropy_head, tiny_artifacts | changed)
        assert load_entropy_head(output) is None
        assert read_json(output / "thresholds.json") == read_json(output / "metrics.json") == {}
        assert sorted(path.name for path in output.iterdir()) == ["config.json", "metrics.json", "thresholds.json"]


def test_own_entropies_are_of_predictions_without_a_patch_of_their_own(tiny_artifacts: dict[str, Path]) -> None:
    store = TokenStore.open(tiny_artifacts["tokenize"] / "tokens.zarr")
    model = load_model(tiny_artifacts["train"])
    assert isinstance(model, DPAR)
    torch.nn.init.normal_(model.output.weight, std=0.5)
    images, views = np.array([5, 1, 40]), np.array([0, 1, 0])
    index = PatchIndex.open(tiny_artifacts["patch_index"] / "patches.parquet", store.digest)
    starts = torch.from_numpy(index.starts(images, views))
    found = StoredTokens(model, store, batch_size=2).of_predictions(images, views, starts)
    tokens = torch.from_numpy(store.fetch(images, views).astype(np.int64))
    labels = torch.from_numpy(store.labels[images].astype(np.int64))
    with torch.inference_mode():
        for position in range(1, 64):
            going_on = starts.clone()
            going_on[:, position] = False
            wanted = token_entropy(model(tokens, labels, pack_patches(going_on))[:, position])
            np.testing.assert_allclose(found[:, position], wanted, atol=1e-4)
