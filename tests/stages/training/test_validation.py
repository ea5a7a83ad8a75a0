"""Held-out loss by position: its mean is the held-out loss, and each stage writes it to its record."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_training import CODES, TOKENS, batch, objective

from conf.schema import Settings
from stages.runtime.artifact import read_json
from stages.runtime.distributed import World
from stages.stores.tokens import TokenStore
from stages.training.data import GPTObjective, TokenData
from stages.training.log import POSITIONS_FILE
from stages.training.stream import Part
from stages.training.validation import heldout_by_position, heldout_loss
from stages.views.record import last_metrics
from stages.weights.own import load_gpt

PART = Part(0, 8)


@pytest.mark.parametrize("name", ["llamagen", "entropy_model", "dpar", "joint_head"])
def test_the_mean_over_positions_is_the_loss(name: str) -> None:
    module = objective(name).eval()
    with torch.no_grad():
        loss, _ = module(batch(name, 0, PART))
        found = module.token_losses(batch(name, 0, PART))
    assert found.shape == (8, TOKENS - (name == "entropy_model"))
    assert float(found.mean()) == pytest.approx(float(loss), rel=1e-6)


def test_losses_are_cross_entropies_of_the_logits() -> None:
    module, given = objective("llamagen").eval(), batch("llamagen", 0, PART)
    with torch.no_grad():
        logits = module.model(given.tokens, given.labels)
        wanted = F.cross_entropy(logits.reshape(-1, CODES), given.tokens.flatten(), reduction="none")
        torch.testing.assert_close(module.token_losses(given).flatten(), wanted)


def test_npps_are_those_of_single_tokens() -> None:
    module, given = objective("npp").eval(), batch("llamagen", 0, PART)
    with torch.no_grad():
        assert torch.equal(module.token_losses(batch("npp", 0, PART)), GPTObjective(module.model).token_losses(given))


@pytest.mark.parametrize(("name", "first"), [("entropy_model", 1), ("train", 0)])
def test_a_stage_writes_the_loss_of_each_position(
    tiny_settings: Settings, tiny_artifacts: dict, name: str, first: int
) -> None:
    found = read_json(tiny_artifacts[name] / POSITIONS_FILE)
    store = TokenStore.of(tiny_artifacts)
    assert found["first_position"] == first
    assert len(found["loss"]) == store.num_tokens - first
    loss = last_metrics(tiny_artifacts[name], "heldout_loss")["heldout_loss"]
    assert np.mean(found["loss"]) == pytest.approx(loss, rel=1e-6)


def test_the_images_are_divided_among_the_processes(tiny_artifacts: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums and counts of two processes add up to those of one."""
    data = TokenData(TokenStore.of(tiny_artifacts))
    module = GPTObjective(load_gpt(tiny_artifacts["entropy_model"])).eval()
    monkeypatch.setattr("stages.training.validation._BATCH", 4)
    whole = heldout_by_position(data, module.token_losses, World(0, 1, torch.device("cpu")))
    sums: list[torch.Tensor] = []
    monkeypatch.setattr(
        "stages.training.validation.all_reduce_sum", lambda total: sums.append(total) or torch.stack(sums).sum(0)
    )
    for rank in (0, 1):
        both = heldout_by_position(data, module.token_losses, World(rank, 2, torch.device("cpu")))
    assert whole is not None
    assert both is not None
    assert both["loss"] == pytest.approx(whole["loss"], rel=1e-12)


def test_without_heldout_images_there_is_no_loss(tiny_artifacts: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TokenStore.of(tiny_artifacts)
    monkeypatch.setattr(store, "num_train", len(store))
    module, world = GPTObjective(load_gpt(tiny_artifacts["entropy_model"])), World(0, 1, torch.device("cpu"))
    assert heldout_by_position(TokenData(store), module.token_losses, world) is None
    assert heldout_loss(TokenData(store), module, world) == {}
