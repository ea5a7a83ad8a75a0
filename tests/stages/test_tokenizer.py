"""Stage tokenizer: trains, imports what it trained, and says how well it reconstructs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.section import Section
from conf.tokenizer import TokenizerConfig
from models.config import VQConfig
from models.discriminator import PatchDiscriminator
from models.lpips import LPIPS
from models.vq import VQModel
from stages.images.decode import center_crop, decode
from stages.runtime.artifact import file_sha256, read_json
from stages.runtime.errors import InputError
from stages.stores.image_index import ImageIndex
from stages.tokenizer import tokenizer
from stages.training.images import ImageBatch, ImageFiles, VQObjective
from stages.training.loop import CHECKPOINTS
from stages.training.stream import Part, SampleStream
from stages.weights.own import load_vq

Run = Callable[[str, Section, dict[str, Path]], Path]
TINY = VQConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=32, codebook_size=64)


def lines(artifact: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (artifact / "record/metrics.jsonl").read_text().splitlines()]


def test_the_scores_are_of_the_heldout_images(
    tiny_settings: Settings, draw_view: Run, tiny_artifacts: dict[str, Path], image_root: Path
) -> None:
    index, model = ImageIndex.open(tiny_artifacts["dataset"]), load_vq(tiny_artifacts["tokenizer"])
    rows = range(index.num_train, len(index))
    pixels = np.stack([center_crop(decode(index.read(image_root, row)), 32) for row in rows]).astype(np.float64)
    with torch.inference_mode():
        codes = model.encode(torch.from_numpy(pixels / 127.5 - 1).float().permute(0, 3, 1, 2))
        decoded = model.decode(codes).permute(0, 2, 3, 1).numpy()
    squared = (np.clip(127.5 * decoded + 128, 0, 255).astype(np.uint8) - pixels) ** 2
    scores = read_json(draw_view("tokenizer", tiny_settings.tokenizer, tiny_artifacts) / "metrics.json")
    assert scores["psnr"] == pytest.approx(
        np.mean(20 * np.log10(255) - 10 * np.log10(squared.mean((1, 2, 3)))), abs=1e-3
    )
    assert scores["heldout_codebook_usage"] == pytest.approx(len(codes.unique()) / 64, abs=1 / 64)


def test_training_lowers_the_loss_and_an_import_gives_the_same_weights(
    tiny_settings: Settings, run_in_process: Run, draw_view: Run, tiny_artifacts: dict[str, Path]
) -> None:
    trained = tiny_artifacts["tokenizer"]
    losses = [line["squared_error"] for line in lines(trained) if "squared_error" in line]
    assert losses[-1] < losses[0]
    config = TokenizerConfig(
        checkpoint=trained / "vq.safetensors", model=tiny_settings.tokenizer.model, image_size=32, lpips_weight=0
    )
    imported = run_in_process("tokenizer", config, {"dataset": tiny_artifacts["dataset"]})
    assert (imported / "vq.safetensors").read_bytes() == (trained / "vq.safetensors").read_bytes()
    assert read_json(imported / "record/source.json")["sha256"] == file_sha256(trained / "vq.safetensors")
    assert not (trained / "record/source.json").exists()
    views = [draw_view("tokenizer", config, {"tokenizer": artifact}) for artifact in (imported, trained)]
    scores = [read_json(view / "metrics.json") for view in views]
    assert scores[0] == scores[1]
    assert scores[0]["num_images"] == 9
    assert [line["psnr"] for line in lines(imported)] == [scores[0]["psnr"]]


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_another_seed_gives_other_weights(
    tiny_settings: Settings, run_in_process: Run, tiny_artifacts: dict[str, Path]
) -> None:
    inputs = {"dataset": tiny_artifacts["dataset"]}
    other = run_in_process("tokenizer", tiny_settings.tokenizer.model_copy(update={"seed": 1}), inputs)
    assert (other / "vq.safetensors").read_bytes() != (tiny_artifacts["tokenizer"] / "vq.safetensors").read_bytes()


def test_perceptual_loss_needs_its_weights_and_says_so(
    tiny_settings: Settings, run_in_process: Run, tiny_artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DPAR_LPIPS_WEIGHTS", raising=False)
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


def test_both_gradients_are_those_of_training_in_turn() -> None:
    torch.manual_seed(0)
    config = TokenizerConfig(model=TINY, image_size=32)
    objective = VQObjective(VQModel(TINY), None, PatchDiscriminator(), config)
    model, discriminator = objective.model, objective.discriminator
    assert discriminator is not None
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    objective(ImageBatch(pixels, adversarial=True))[0].backward()
    reconstruction, quantized = model(pixels)
    vq = (reconstruction - pixels).square().mean() + quantized.codebook_loss + 0.25 * quantized.commitment_loss
    fooling = -discriminator(reconstruction).mean()
    real, fake = discriminator(pixels), discriminator(reconstruction.detach())
    telling = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    for network, loss in ((model, vq + 0.5 * fooling), (discriminator, 0.5 * telling)):
        expected = torch.autograd.grad(loss, list(network.parameters()))
        for weight, gradient in zip(network.parameters(), expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-4)


def test_before_its_start_the_discriminator_has_gradients_of_zero_and_sees_nothing() -> None:
    objective = VQObjective(VQModel(TINY), None, PatchDiscriminator(), TokenizerConfig(model=TINY, image_size=32))
    assert objective.discriminator is not None
    objective(ImageBatch(torch.rand(1, 3, 32, 32), adversarial=False))[0].backward()
    for weight in objective.discriminator.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()
    assert all(not count for name, count in objective.discriminator.named_buffers() if name.endswith("tracked"))


def test_the_tiny_preset_plays_against_a_discriminator_from_its_start_on(tiny_artifacts: dict[str, Path]) -> None:
    losses = {line["step"]: line for line in lines(tiny_artifacts["tokenizer"]) if "loss" in line}
    assert [step for step, line in losses.items() if "discriminator_loss" in line] == [6, 8]
    assert [step for step, line in losses.items() if line["discriminator_grad_norm"] > 0] == [6, 8]
    assert 0 < losses[8]["codebook_usage"] <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_killed_after_the_discriminators_start_it_ends_the_same_bit_for_bit(
    tiny_settings: Settings,
    tiny_artifacts: dict[str, Path],
    image_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the same seed gives the same weights."""
    inputs = {"dataset": tiny_artifacts["dataset"], "images": image_root}
    runtime = RuntimeConfig(device="cpu", threads=2)
    training = tiny_settings.tokenizer.training.model_copy(update={"checkpoint_every": 6})
    config = tiny_settings.tokenizer.model_copy(update={"training": training})
    whole = ImageFiles.training_pixels

    def breaks(self: ImageFiles, stream: SampleStream, step: int, part: Part) -> torch.Tensor:
        if step == 7:
            raise KeyboardInterrupt
        return whole(self, stream, step, part)

    monkeypatch.setattr(ImageFiles, "training_pixels", breaks)
    with pytest.raises(KeyboardInterrupt):
        tokenizer(config, inputs, tmp_path, runtime)
    assert [path.name for path in (tmp_path / CHECKPOINTS).glob("*.pt")] == ["step-000000006.pt"]
    monkeypatch.undo()
    tokenizer(config, inputs, tmp_path, runtime)
    assert (tmp_path / "vq.safetensors").read_bytes() == (tiny_artifacts["tokenizer"] / "vq.safetensors").read_bytes()


def test_a_finished_tokenizer_loads_ready_to_use(tiny_artifacts: dict[str, Path]) -> None:
    model = load_vq(tiny_artifacts["tokenizer"])
    assert not model.training
    pixels = torch.from_numpy(np.zeros((1, 3, 32, 32), np.float32))
    assert model.encode(pixels).shape == (1, 64)
