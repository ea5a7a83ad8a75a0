"""The ImageNet presets: the paper's settings, for every family."""

from __future__ import annotations

import pytest

from conf.load import load_settings, names
from conf.section import TrainingConfig
from conf.train import FAMILIES, NPPSettings
from models.config import DPAR_SIZES, GPT_SIZES

EPOCH = 1_281_167 // 256
STEPS = 300 * EPOCH
PAPER = {
    # image size, model, threshold, guidance of DPAR, guidance of NPP
    "imagenet128-b": (128, "B", 7.6, 2.1, 2.0),
    "imagenet256-b": (256, "B", 7.8, 2.1, 2.0),
    "imagenet256-l": (256, "L", 7.8, 1.9, 1.75),
    "imagenet256-xl": (256, "XL", 7.8, 2.0, 1.7),
    "imagenet384-b": (384, "B", 7.9, 2.1, 2.0),
    "imagenet384-l": (384, "L", 7.9, 1.9, 1.75),
    "imagenet384-xl": (384, "XL", 7.9, 1.9, 1.7),
    "imagenet384-xxl": (384, "XXL", 7.9, 1.9, 1.65),
    "imagenet512-b": (512, "B", 8.1, 2.1, 2.0),
}


def test_every_imagenet_preset_is_held_to_the_paper() -> None:
    assert {name for name in names("preset") if name.startswith("imagenet")} == set(PAPER)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PAPER)
def test_settings_are_the_papers(preset: str, family: str) -> None:
    settings, _ = load_settings(preset, None, [f"train.family={family}"])
    size, model, threshold, guidance, npp_guidance = PAPER[preset]
    assert settings.tokenize.image_size == size
    assert settings.sample.image_size == 256, "the size that samples are scored at"
    assert (settings.patch_index.threshold, settings.patch_index.max_length) == (threshold, 4)
    assert settings.entropy_model.model == GPT_SIZES["B"]
    assert settings.entropy_model.training == TrainingConfig(steps=STEPS)
    assert settings.train.model == (DPAR_SIZES if family == "dpar" else GPT_SIZES)[model]
    assert settings.sample.cfg_scale == (npp_guidance if family == "npp" else guidance)
    assert settings.sample.boundaries == ("entropy_model" if family == "dpar" else None)
    schedule = {"warmup_steps": EPOCH, "decay": "linear_tail"} if family == "npp" else {}
    assert settings.train.training == TrainingConfig(steps=STEPS, **schedule)


def test_the_recipe_is_the_papers() -> None:
    recipe = load_settings("imagenet256-b")[0].train.training
    assert (recipe.learning_rate, recipe.betas, recipe.weight_decay) == (1e-4, (0.9, 0.95), 0.05)
    assert (recipe.grad_clip, recipe.global_batch_size, recipe.decay) == (1.0, 256, "constant")


@pytest.mark.parametrize("ablation", ["npp", "llamagen"])
def test_an_ablation_and_the_setting_give_the_same_family(ablation: str) -> None:
    by_name = load_settings("imagenet256-l", ablation)[0]
    assert by_name == load_settings("imagenet256-l", None, [f"train.family={ablation}"])[0]


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_npps_levels_end_with_whole_epochs(levels: int) -> None:
    section = load_settings("imagenet256-l", "npp", [f"train.npp.levels={levels}"])[0].train
    assert isinstance(section, NPPSettings)
    assert [end % EPOCH for end in section.npp.ends(STEPS)] == [0] * levels


@pytest.mark.parametrize("ablation", names("ablation"))
def test_every_ablation_stands_over_an_imagenet_preset(ablation: str) -> None:
    settings, _ = load_settings("imagenet256-l", ablation)
    if ablation == "static":
        assert settings.sample.boundaries == "static"


def test_the_entropy_head_is_one_setting_away() -> None:
    settings, _ = load_settings("imagenet384-xl", None, ["sample.boundaries=entropy_head"])
    assert "entropy_head" not in settings.sample.unread_inputs(settings)
    assert "entropy_model" in settings.sample.unread_inputs(settings)
