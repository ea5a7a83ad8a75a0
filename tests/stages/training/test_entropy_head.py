"""A head beside its model: what it learns, what the model learns with it, and what it costs the model: nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.schema import Section, Settings
from models.config import DPARConfig
from models.dpar import DPAR, pack_patches
from models.entropy_head import EntropyHead
from models.patching import static_patch_starts
from stages.artifact import read_json
from stages.distributed import World
from stages.stores.entropies import EntropyStore
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenStore
from stages.training.entropy_head import EntropyBatch, EntropyData, FrozenObjective, JointObjective, predict_with
from stages.training.patched import DPARObjective
from stages.weights import load_model

Run = Callable[[str, Section, dict[str, Path]], Path]
SHAPE: dict[str, Any] = {
    "dim": 32, "num_heads": 2, "encoder_layers": 1, "global_layers": 2, "decoder_layers": 1,
    "codebook_size": 64, "num_tokens": 16, "num_classes": 3,
}  # fmt: skip


def dpar(kind: str) -> DPAR:
    torch.manual_seed(0)
    return DPAR(DPARConfig(**SHAPE, entropy_head=kind))


def batch() -> EntropyBatch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(64, (6, 16), generator=generator)
    patches = pack_patches(static_patch_starts(2.0, 16).expand(6, -1))
    return EntropyBatch(tokens, torch.arange(6) % 3, patches, 4 * torch.rand(6, 16, generator=generator))


def gradients(objective: torch.nn.Module, given: EntropyBatch) -> dict[str, Tensor]:
    objective.zero_grad()
    torch.manual_seed(2)
    objective(given)[0].backward()
    return {name: weight.grad.clone() for name, weight in objective.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_all_other_weights_begin_as_they_would_without_a_head(kind: str) -> None:
    with_head, without = dpar(kind).state_dict(), dpar("none").state_dict()
    assert set(with_head) - set(without) == {name for name in with_head if name.startswith("entropy_head.")}
    assert all(torch.equal(with_head[name], weight) for name, weight in without.items())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_logits_of_given_boundaries_are_untouched_by_the_head_bit_for_bit(kind: str) -> None:
    given, without, with_head = batch(), dpar("none"), dpar(kind)
    for model in (without, with_head):
        torch.nn.init.normal_(model.output.weight, generator=torch.Generator().manual_seed(3))
        model.eval()
    logits = [model(given.tokens, given.labels, given.patches) for model in (without, with_head)]
    assert logits[0].std() > 0.1
    assert torch.equal(*logits)


def test_entropies_start_in_the_middle_of_their_range_and_stay_in_it() -> None:
    head = EntropyHead("mlp", 32, 64)
    states = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(states), torch.full((5, 7), float(np.log(64)) / 2))
    with torch.no_grad():
        head.weight.fill_(1e4)
    assert head(states).min() >= 0
    assert head(states).max() <= np.log(64) + 1e-6
    assert head.bfloat16()(states.bfloat16()).dtype == torch.float32


def test_the_error_and_the_loss_are_what_they_say() -> None:
    given, model = batch(), dpar("mlp").eval()
    assert model.entropy_head is not None
    torch.nn.init.normal_(model.entropy_head.weight)
    loss, logged = JointObjective(model, 0.5)(given)
    told = model.entropy_head(model.encoder_states(given.tokens))
    error = (told - given.entropies[:, 1:]).square().mean()
    torch.testing.assert_close(logged["entropy_error"], error)
    torch.testing.assert_close(logged["token_loss"], DPARObjective(model)(given)[0])
    torch.testing.assert_close(loss, logged["token_loss"] + logged["entropy_error"])


def test_with_its_gradient_stopped_the_model_gets_the_gradients_that_it_gets_without_a_head() -> None:
    given, alone = batch(), dpar("none")
    beside = dpar("mlp")
    assert beside.entropy_head is not None
    for model in (alone, beside):
        torch.nn.init.normal_(model.output.weight, generator=torch.Generator().manual_seed(3))
    torch.nn.init.normal_(beside.entropy_head.weight)
    wanted, found = gradients(DPARObjective(alone), given), gradients(JointObjective(beside, 0.0), given)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
    assert found["model.entropy_head.hidden.weight"].abs().max() > 0


def test_the_weight_of_its_gradient_acts_in_the_encoder_and_not_in_the_head() -> None:
    given, model = batch(), dpar("mlp")
    assert model.entropy_head is not None
    torch.nn.init.normal_(model.entropy_head.weight)
    stopped, half, whole = (gradients(JointObjective(model, weight), given) for weight in (0.0, 0.5, 1.0))
    name = "model.local_encoder.layers.0.attention.wqkv.weight"
    pull = whole[name] - stopped[name]
    assert pull.abs().max() > 0
    torch.testing.assert_close(half[name] - stopped[name], pull / 2, atol=1e-6, rtol=1e-3)
    for name in stopped:
        if "entropy_head" in name or "local_decoder" in name:
            torch.testing.assert_close(whole[name], stopped[name])


def test_a_frozen_model_learns_nothing_while_its_head_does() -> None:
    given, model = batch(), dpar("none")
    head = EntropyHead("linear", 32, 64)
    found = gradients(FrozenObjective(model, head), given)
    assert set(found) == {f"head.{name}" for name, _ in head.named_parameters()}
    loss, _ = FrozenObjective(model, head)(given)
    torch.testing.assert_close(loss, (np.log(64) / 2 - given.entropies[:, 1:]).square().mean())


@pytest.fixture(scope="module")
def data(tiny_artifacts: dict[str, Path]) -> EntropyData:
    store = TokenStore.open(tiny_artifacts["tokenize"] / "tokens.zarr")
    index = PatchIndex.open(tiny_artifacts["patch_index"] / "patches.parquet", store.digest)
    return EntropyData(store, index, EntropyStore.open(tiny_artifacts["entropy_map"] / "entropies.zarr"))


def test_a_batch_has_the_entropies_of_its_images_in_their_views(data: EntropyData) -> None:
    images, views = np.array([3, 0, 7]), np.array([1, 0, 1])
    found = data.batch(images, views)
    assert np.array_equal(found.entropies, data.entropies.fetch(images, views))
    assert np.array_equal(found.tokens, data.store.fetch(images, views))
    assert data.digests["entropies"] == data.entropies.digest


@pytest.mark.parametrize("batch_size", [2, 128])
def test_the_heldout_fit_is_pearsons_correlation_and_the_mean_square(data: EntropyData, batch_size: int) -> None:
    def predict(tokens: Tensor) -> Tensor:
        return (tokens[:, :-1] + 2 * tokens[:, 1:]).float()

    found = data.heldout_fit(predict, World(0, 1, torch.device("cpu")), batch_size)
    rows = np.arange(data.store.num_train, len(data.store))
    tokens = torch.from_numpy(data.store.fetch(rows, np.zeros_like(rows)).astype(np.int64))
    told, wanted = predict(tokens).numpy(), data.entropies.fetch(rows, np.zeros_like(rows))[:, 1:]
    assert found["heldout_entropy_correlation"] == pytest.approx(np.corrcoef(told.ravel(), wanted.ravel())[0, 1])
    assert found["heldout_entropy_error"] == pytest.approx(np.square(told - wanted).mean(dtype=np.float64))


def test_a_model_trained_with_a_stopped_head_is_the_one_trained_without_bit_for_bit(
    tiny_settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run, data: EntropyData
) -> None:
    inputs = {name: tiny_artifacts[name] for name in ("tokenize", "entropy_map", "patch_index")}
    models, metrics = [], []
    for head in ({"kind": "none"}, {"kind": "mlp", "encoder_gradient": 0.0}):
        fields = tiny_settings.train.model_dump()
        fields["training"]["grad_clip"] = 0.05  # so that it acts in every step
        artifact = run_in_process("train", type(tiny_settings.train)(**fields | {"entropy_head": head}), inputs)
        models.append(load_model(artifact))
        metrics.append(read_json(artifact / "metrics.json"))
    without, with_head = (model.state_dict() for model in models)
    assert all(torch.equal(with_head[name], weight) for name, weight in without.items())
    assert with_head["entropy_head.weight"].abs().max() > 0
    assert metrics[1]["heldout_loss"] == metrics[0]["heldout_loss"]
    assert isinstance(models[1], DPAR)
    assert models[1].entropy_head is not None
    with torch.no_grad():
        fit = data.heldout_fit(predict_with(models[1].entropy_head, models[1]), World(0, 1, torch.device("cpu")))
    assert {name: metrics[1][name] for name in fit} == fit
    assert "heldout_entropy_correlation" not in metrics[0]
