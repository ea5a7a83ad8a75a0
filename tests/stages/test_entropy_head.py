"""Stage `entropy_head`: a head that learns the stored entropies, thresholds that keep the mean length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.section import Section
from conf.train import TrainConfig
from models.config import EntropyHeadConfig
from models.dpar import DPAR
from models.entropy_head import EntropyHead, entropies_of
from models.gpt import token_entropy
from models.packed_patches import pack_patches
from models.patching import PatchRule, patch_starts
from pipeline.graph import STAGES
from stages.entropy_head import entropy_head
from stages.families import load_model
from stages.patches.own_entropy import own_entropies
from stages.runtime.artifact import read_json
from stages.stores.entropies import EntropyStore
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenStore
from stages.training.entropies import EntropyData, HeadObjective
from stages.weights.own import load_head

Run = Callable[[str, Section, dict[str, Path]], Path]


@pytest.fixture(scope="module")
def without_head(tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run) -> Path:
    """The artifact with settings that ask for no head."""
    config = tiny_settings.entropy_head.model_copy(update={"kind": "none"})
    return run_in_process("entropy_head", config, tiny_artifacts)


def test_thresholds_give_the_patch_indexs_mean_length_on_what_they_were_chosen_by(
    tiny_artifacts: dict[str, Path],
) -> None:
    artifact, rule = tiny_artifacts["entropy_head"], read_json(tiny_artifacts["patch_index"] / "rule.json")
    thresholds = read_json(artifact / "thresholds.json")
    assert set(thresholds) == {"entropy_head", "own_entropy"}
    with np.load(artifact / "entropies.npz") as saved:
        for source, threshold in thresholds.items():
            starts = patch_starts(PatchRule(threshold, 4, True, 8), torch.from_numpy(saved[source]))
            assert starts.numel() / int(starts.sum()) == pytest.approx(rule["mean_length"], rel=0.01)


def test_what_is_saved_is_what_the_head_says(tiny_artifacts: dict[str, Path]) -> None:
    model, head = load_model(tiny_artifacts["train"]), load_head(tiny_artifacts["entropy_head"])
    assert isinstance(model, DPAR)
    store = TokenStore.of(tiny_artifacts)
    total = store.num_train * store.num_views
    with np.load(tiny_artifacts["entropy_head"] / "entropies.npz") as saved:
        assert len(saved["entropy_head"]) == total, "all training views are fewer than calibrated_on"
        rows = np.arange(total)
        tokens = torch.from_numpy(store.fetch(rows % store.num_train, rows // store.num_train).astype(np.int64))
        with torch.inference_mode():
            found = entropies_of(model, head, tokens)
        np.testing.assert_allclose(saved["entropy_head"], found.numpy(), atol=1e-5)


@pytest.mark.slow
def test_each_source_was_asked_about_the_heldout_images(tiny_artifacts: dict[str, Path]) -> None:
    model, head = load_model(tiny_artifacts["train"]), load_head(tiny_artifacts["entropy_head"])
    assert isinstance(model, DPAR)
    store = TokenStore.open(tiny_artifacts["tokenize"] / "tokens.zarr")
    index = PatchIndex.open(tiny_artifacts["patch_index"] / "patches.parquet", store.digest)
    rows = np.arange(store.num_train, len(store))
    tokens = torch.from_numpy(store.fetch(rows, rows * 0).astype(np.int64))
    labels = torch.from_numpy(store.labels[rows].astype(np.int64))
    with torch.inference_mode():
        wanted = {
            "entropy_head": entropies_of(model, head, tokens),
            "own_entropy": own_entropies(model, tokens, labels, torch.from_numpy(index.starts(rows, rows * 0))),
        }
    with np.load(tiny_artifacts["entropy_head"] / "heldout.npz") as saved:
        assert set(saved) == set(wanted)
        for source, entropies in wanted.items():
            np.testing.assert_allclose(saved[source], entropies.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("stage", "changes"), [("train", {"family": "llamagen", "model": {"dim": 32, "num_layers": 2, "num_heads": 2}})]
)
def test_a_baseline_has_no_source_of_its_own(
    tiny_settings: Settings,
    tiny_artifacts: dict[str, Path],
    run_in_process: Run,
    stage: str,
    changes: dict[str, object],
) -> None:
    baseline = TrainConfig.model_validate({"training": tiny_settings.train.training} | changes)
    inputs = dict(tiny_artifacts)
    inputs["train"] = run_in_process("train", baseline, tiny_artifacts)
    artifact = run_in_process("entropy_head", tiny_settings.entropy_head, inputs)
    assert read_json(artifact / "thresholds.json") == {}
    assert not (artifact / "entropy_head.safetensors").exists()


@pytest.mark.slow
def test_without_a_head_the_models_own_entropy_is_left(without_head: Path) -> None:
    assert set(read_json(without_head / "thresholds.json")) == {"own_entropy"}
    assert not (without_head / "entropy_head.safetensors").exists()


@pytest.mark.slow
def test_own_entropies_are_of_forwards_in_which_no_patch_opens(tiny_artifacts: dict[str, Path]) -> None:
    model = load_model(tiny_artifacts["train"])
    assert isinstance(model, DPAR)
    store = TokenStore.of(tiny_artifacts)
    rows = np.arange(4)
    tokens = torch.from_numpy(store.fetch(rows, rows * 0).astype(np.int64))
    labels = torch.from_numpy(store.labels[rows].astype(np.int64))
    index = PatchIndex.of(tiny_artifacts, store)
    starts = torch.from_numpy(index.starts(rows, rows * 0))
    with torch.inference_mode():
        found = own_entropies(model, tokens, labels, starts)
        for position in (1, 7, 40, 63):
            open_on = starts.clone()
            open_on[:, position:] = False
            expected = token_entropy(model(tokens, labels, pack_patches(open_on))[:, position])
            torch.testing.assert_close(found[:, position], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_models_own_entropies_do_not_depend_on_a_head_that_was_trained(
    tiny_artifacts: dict[str, Path], without_head: Path
) -> None:
    artifacts = (tiny_artifacts["entropy_head"], without_head)
    thresholds = [read_json(artifact / "thresholds.json")["own_entropy"] for artifact in artifacts]
    assert thresholds[0] == thresholds[1]
    saved = []
    for artifact in artifacts:
        with np.load(artifact / "entropies.npz") as entropies:
            saved.append(entropies["own_entropy"])
    assert np.array_equal(*saved), "the model drops nothing out"


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_interrupted_in_training_and_after_it_ends_the_same_bit_for_bit(
    tiny_settings: Settings, tiny_artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = EntropyData.training_batch
    steps: list[int] = []

    def breaks_once(self: EntropyData, stream: Any, step: int, *given: Any) -> Any:
        steps.append(step)
        if steps == list(range(7)):
            raise KeyboardInterrupt
        return whole(self, stream, step, *given)

    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    inputs = {name: tiny_artifacts[name] for name in STAGES["entropy_head"].inputs}
    given = (tiny_settings.entropy_head, inputs, tmp_path, RuntimeConfig(device="cpu", threads=2))
    with monkeypatch.context() as patch:
        patch.setattr(EntropyData, "training_batch", breaks_once)
        patch.setattr("stages.entropy_head._calibrate", stops)
        for seed in (97, 98):
            torch.manual_seed(seed)
            with pytest.raises(KeyboardInterrupt):
                entropy_head(*given)
    assert steps == [*range(7), *range(4, 8)], "the second run starts from the checkpoint, and reaches the end"
    torch.manual_seed(99)
    entropy_head(*given)
    made = sorted(path for path in tiny_artifacts["entropy_head"].iterdir() if path.is_file())
    assert [path.name for path in made] == [
        "entropies.npz",
        "entropy_head.json",
        "entropy_head.safetensors",
        "heldout.npz",
        "thresholds.json",
    ]
    for path in made:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_head_learns_and_the_model_stays(tiny_artifacts: dict[str, Path]) -> None:
    model = load_model(tiny_artifacts["train"])
    assert isinstance(model, DPAR)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    store = TokenStore.of(tiny_artifacts)
    data = EntropyData(
        store,
        PatchIndex.of(tiny_artifacts, store),
        EntropyStore.of(tiny_artifacts),
    )
    torch.manual_seed(0)
    objective = HeadObjective(model, EntropyHead(EntropyHeadConfig.of(model.config, "block")))
    optimizer = torch.optim.Adam(objective.head.parameters(), lr=3e-3)
    batch = data.batch(np.arange(8), np.zeros(8, dtype=np.int64))
    losses = []
    for _ in range(60):
        loss, _ = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
