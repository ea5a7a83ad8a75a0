"""Stage tokenizer: trains, imports what it trained, and says how well it reconstructs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.schema import Section, Settings, TokenizerConfig
from models.config import VQConfig
from models.discriminator import PatchDiscriminator
from models.lpips import LPIPS
from models.vq import VQModel
from stages.artifact import read_json
from stages.errors import InputError
from stages.training.images import ImageBatch, VQObjective
from stages.weights import load_vq

Run = Callable[[str, Section, dict[str, Path]], Path]
TINY = VQConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=32, codebook_size=64)


def test_training_lowers_the_loss_and_an_import_gives_the_same_weights(
    tiny_settings: Settings, run_in_process: Run, tiny_artifacts: dict[str, Path]
) -> None:
    trained = tiny_artifacts["tokenizer"]
    lines = (trained / "record/metrics.jsonl").read_text().splitlines()
    losses = [float(line.split('"squared_error": ')[1].split(",")[0]) for line in lines if "squared_error" in line]
    assert losses[-1] < losses[0]
    config = TokenizerConfig(
        checkpoint=trained / "vq.safetensors", model=tiny_settings.tokenizer.model, image_size=32, lpips_weight=0
    )
    imported = run_in_process("tokenizer", config, {"dataset": tiny_artifacts["dataset"]})
    assert (imported / "vq.safetensors").read_bytes() == (trained / "vq.safetensors").read_bytes()
    assert read_json(imported / "metrics.json") == read_json(trained / "metrics.json")
    assert read_json(imported / "metrics.json")["num_images"] == 9


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    tiny_settings: Settings, run_in_process: Run, tiny_artifacts: dict[str, Path]
) -> None:
    inputs = {"dataset": tiny_artifacts["dataset"]}
    again = run_in_process("tokenizer", tiny_settings.tokenizer, inputs)
    other = run_in_process("tokenizer", tiny_settings.tokenizer.model_copy(update={"seed": 1}), inputs)
    weights = (tiny_artifacts["tokenizer"] / "vq.safetensors").read_bytes()
    assert (again / "vq.safetensors").read_bytes() == weights
    assert (other / "vq.safetensors").read_bytes() != weights


def test_perceptual_loss_needs_its_weights_and_says_so(
    tiny_settings: Settings, run_in_process: Run, tiny_artifacts: dict[str, Path]
) -> None:
    config = tiny_settings.tokenizer.model_copy(update={"lpips_weight": 1.0})
    with pytest.raises(InputError, match=r"make lpips.*tokenizer.lpips_weight=0"):
        run_in_process("tokenizer", config, {"dataset": tiny_artifacts["dataset"]})


def test_every_term_of_the_loss_counts_with_its_weight() -> None:
    torch.manual_seed(0)
    lpips = LPIPS()
    for head in lpips.heads:
        head.data.uniform_()
    config = TokenizerConfig(
        model=TINY, image_size=32, commitment_weight=0.25, lpips_weight=0.5, adversarial_weight=0.125
    )
    objective = VQObjective(VQModel(TINY), lpips, PatchDiscriminator(), config)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        loss, parts = objective(ImageBatch(pixels, adversarial=False))
        expected = (
            parts["squared_error"] + parts["codebook_loss"] + 0.25 * parts["commitment_loss"] + 0.5 * parts["lpips"]
        )
        torch.testing.assert_close(loss, expected)
        assert not {"generator_loss", "discriminator_loss", "logits_real", "logits_fake"} & set(parts)
        loss, parts = objective(ImageBatch(pixels, adversarial=True))
    expected = expected + 0.125 * parts["generator_loss"] + 0.125 * parts["discriminator_loss"]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts["generator_loss"], -parts["logits_fake"])


def test_a_finished_tokenizer_loads_ready_to_use(tiny_artifacts: dict[str, Path]) -> None:
    model = load_vq(tiny_artifacts["tokenizer"])
    assert not model.training
    pixels = torch.from_numpy(np.zeros((1, 3, 32, 32), np.float32))
    assert model.encode(pixels).shape == (1, 64)
