"""The first training step of every ImageNet preset and family, on tensors without data: shapes and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from conf.load import load_settings, names
from conf.schema import Settings
from conf.section import TrainingConfig
from conf.train import FAMILIES, NPPSettings
from models.config import GPTConfig
from models.gpt import GPT
from models.packed_patches import pack_patches
from models.patching import static_patch_starts
from stages.families import ARCHITECTURES, RECIPES
from stages.training.data import GPTObjective, TokenBatch
from stages.training.next_patch import NextPatchBatch
from stages.training.optim import learning_rate, make_optimizer
from stages.training.patched import PatchedBatch

META = torch.device("meta")
BATCH = 4
CODES, CLASSES = 16_384, 1000
PRESETS = [name for name in names("preset") if name.startswith("imagenet")]


def cases() -> Iterator[Any]:
    for preset in PRESETS:
        large = preset.endswith(("-l", "xl"))
        for family in FAMILIES:
            yield pytest.param(preset, family, marks=[pytest.mark.slow] if large else [], id=f"{preset}-{family}")


def num_tokens(settings: Settings) -> int:
    return (settings.tokenize.image_size // settings.tokenizer.model.downsample) ** 2


def first_batch(settings: Settings) -> TokenBatch:
    tokens = torch.zeros(BATCH, num_tokens(settings), dtype=torch.int64, device=META)
    labels = torch.zeros(BATCH, dtype=torch.int64, device=META)
    if settings.train.has_patches:
        starts = static_patch_starts(1.81, num_tokens(settings)).expand(BATCH, -1)
        return PatchedBatch(tokens, labels, pack_patches(starts).map(lambda tensor: tensor.to(META)))
    if isinstance(settings.train, NPPSettings):
        return NextPatchBatch(tokens, labels, settings.train.npp.side(0, settings.train.training.steps))
    return TokenBatch(tokens, labels)


def step(model: nn.Module, objective: nn.Module, batch: TokenBatch, config: TrainingConfig) -> None:
    """Forward, backward, clip and AdamW; every weight must move, so each must have a gradient and optimiser state."""
    loss, _ = objective.train()(batch)
    loss.backward()
    assert loss.shape == ()
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group.update(fused=None, foreach=False)  # the fused step has no meta kernel
    clip_grad_norm_(model.parameters(), config.grad_clip)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "family"), [*cases()])
@pytest.mark.usefixtures("without_shape_checks")
def test_a_family_takes_its_first_step(preset: str, family: str) -> None:
    settings, _ = load_settings(preset, None, [f"train.family={family}"])
    store = SimpleNamespace(codebook_size=CODES, num_tokens=num_tokens(settings), num_classes=CLASSES)
    with META:
        model = ARCHITECTURES[family].module(RECIPES[family].config(settings.train, store))  # type: ignore[arg-type]
    objective = RECIPES[family].objective(settings.train, model, None)
    step(model, objective.module, first_batch(settings), settings.train.training)


@pytest.mark.parametrize("preset", ["imagenet128-b", "imagenet256-b", "imagenet384-b", "imagenet512-b"])
def test_the_entropy_model_takes_its_first_step(preset: str) -> None:
    settings, _ = load_settings(preset)
    tokens = num_tokens(settings)
    size = asdict(settings.entropy_model.model)
    with META:
        model = GPT(GPTConfig(**size, codebook_size=CODES, num_tokens=tokens, num_classes=None))
    batch = TokenBatch(torch.zeros(BATCH, tokens, dtype=torch.int64, device=META), torch.zeros(BATCH).long().to(META))
    step(model, GPTObjective(model), batch, settings.entropy_model.training)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_steps_rate_is_the_published_one(family: str) -> None:
    section = load_settings("imagenet256-b", None, [f"train.family={family}"])[0].train
    rates = [learning_rate(number, section.training, section.restarts) for number in (0, 5004, 750_600, 755_604)]
    assert rates == ([0.0, 1e-4, 0.0, 1e-4] if family == "npp" else [1e-4] * 4)


def test_the_smaller_entropy_model_is_half_as_large() -> None:
    def parameters(ablation: str | None) -> int:
        size = asdict(load_settings("imagenet256-b", ablation)[0].entropy_model.model)
        with META:
            model = GPT(GPTConfig(**size, codebook_size=CODES, num_tokens=256, num_classes=None))
        return sum(parameter.numel() for parameter in model.parameters())

    assert parameters(None) == pytest.approx(110e6, rel=0.01)
    assert parameters("entropy-model-50m") == pytest.approx(50e6, rel=0.03)
