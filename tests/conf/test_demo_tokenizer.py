"""The shipped tokenizer of the demo is what its card says."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from conf.load import CONF_DIR, load_settings
from models.vq import VQModel
from stages.images.decode import center_crop, decode
from stages.images.listing import list_images
from stages.images.sources import image_root
from stages.images.tensors import float_to_pixels, pixels_to_float
from stages.runtime.arrays import PixelBatch
from stages.weights.pretrained import read_vq_checkpoint

WEIGHTS = CONF_DIR / "demo" / "vq.safetensors"
CARD = json.loads((CONF_DIR / "demo" / "card.json").read_text())


def test_the_weights_are_small_and_those_of_the_card() -> None:
    assert WEIGHTS.stat().st_size <= 4_000_000
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == CARD["sha256"]


def test_the_demo_and_the_preset_that_made_it_have_one_architecture() -> None:
    demo, made = load_settings("demo")[0], load_settings("demo-tokenizer")[0]
    assert demo.tokenizer.model == made.tokenizer.model
    assert demo.tokenizer.image_size == made.tokenizer.image_size == demo.tokenize.image_size
    assert demo.dataset == made.dataset
    assert made.tokenizer.seed == CARD["seed"]


def test_training_it_in_the_demo_is_one_setting_away() -> None:
    settings, _ = load_settings("demo", None, ["tokenizer.source=train"])
    assert settings.tokenizer.training.steps == 300
    assert settings.tokenizer.lpips_weight == 0  # which needs no weights that the demo does not install


def shipped(stride: int) -> tuple[VQModel, PixelBatch]:
    """The tokenizer, and every `stride`-th emoji at 64 pixels."""
    settings, _ = load_settings("demo")
    model = read_vq_checkpoint(WEIGHTS, settings.tokenizer.model).eval()
    files = list_images(settings.dataset).relpaths[::stride]
    root = image_root(settings.dataset)
    return model, np.stack([center_crop(decode((root / file).read_bytes()), 64) for file in files])


@pytest.mark.slow
def test_it_reconstructs_emoji_about_as_well_as_the_card_says() -> None:
    model, images = shipped(120)
    with torch.inference_mode():
        decoded = float_to_pixels(model.decode(model.encode(pixels_to_float(images))))
    errors = ((decoded.astype(np.float64) - images) ** 2).reshape(len(images), -1).mean(axis=1)
    psnr = (10 * np.log10(255**2 / errors)).mean()
    assert psnr == pytest.approx(CARD["metrics"]["psnr"], abs=1.5)  # these are other images than the card's


@pytest.mark.slow
def test_in_bfloat16_one_token_in_a_hundred_differs_and_pixels_hardly() -> None:
    """Why tokens are made in float32, and images may be decoded in bfloat16."""
    model, images = shipped(300)
    pixels = pixels_to_float(images)
    with torch.inference_mode():
        tokens = model.encode(pixels)
        decoded = float_to_pixels(model.decode(tokens)).astype(int)
        model.bfloat16()
        differing = (model.encode(pixels) != tokens).float().mean()
        rounded = float_to_pixels(model.decode(tokens).float()).astype(int)
    assert 0 < differing < 0.02
    assert np.abs(rounded - decoded).max() <= 8
    assert (np.abs(rounded - decoded) > 1).mean() < 0.02
