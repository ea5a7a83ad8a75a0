"""Sections: bounds, contradictions, names of sizes, and what enters a key."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from conf.schema import (
    DatasetConfig,
    EvaluateConfig,
    PatchIndexConfig,
    Settings,
    TokenizerConfig,
    TrainConfig,
    TrainingConfig,
)
from models.config import DPAR_SIZES, GPT_SIZES


def test_defaults_are_the_papers_256_px_recipe() -> None:
    settings = Settings()
    assert settings.patch_index.threshold == 7.8
    assert settings.patch_index.max_length == 4
    assert settings.train.training.learning_rate == 1e-4
    assert settings.train.training.betas == (0.9, 0.95)
    assert settings.train.model == DPAR_SIZES["B"]


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        (PatchIndexConfig, {}, "expected exactly one of threshold, target_mean_length"),
        (PatchIndexConfig, {"threshold": 7.8, "target_mean_length": 1.8}, "threshold, target_mean_length"),
        (PatchIndexConfig, {"mode": "static", "threshold": 7.8}, "expected exactly one of static_length"),
        (PatchIndexConfig, {"threshold": 7.8, "max_length": 0}, "greater than 0"),
        (TrainingConfig, {"steps": 10, "warmup_steps": 10}, "fewer than steps"),
        (TrainingConfig, {"steps": 10, "learning_rate": 0}, "greater than 0"),
        (TokenizerConfig, {"image_size": 100}, "multiple of 16"),
        (
            TokenizerConfig,
            {"source": "train", "image_size": 16, "adversarial_start": 0},
            r"at least 24 for the discriminator: or set tokenizer\.adversarial_weight",
        ),
        (TrainingConfig, {"steps": 10, "ema_decay": 1.0}, "less than 1"),
        (DatasetConfig, {"source": "twemoji", "root": "here"}, "finds its images itself"),
        (EvaluateConfig, {"extractor": "inception"}, "weights file with inception"),
        (TrainConfig, {"model": "Z"}, "expected one of B, L"),
        (TrainConfig, {"family": "llamagen", "model": DPAR_SIZES["B"]}, "expected GPTSize"),
        (TrainConfig, {"model": {"dim": 100, "num_heads": 3, "num_layers": 1}}, "multiple of 4"),
        (Settings, {"tokenize": {"image_size": 250}}, "tokenize.image_size is 250"),
        (Settings, {"trian": {}}, "Extra inputs"),
    ],
)
def test_contradictions_name_both_sides(section: type[Any], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        section.model_validate(fields)


def test_a_sizes_name_means_its_numbers() -> None:
    named = TrainConfig.model_validate({"family": "llamagen", "model": "L"})
    spelled = TrainConfig.model_validate(
        {"family": "llamagen", "model": {"dim": 1024, "num_layers": 24, "num_heads": 16}}
    )
    assert named.model == GPT_SIZES["L"]
    assert named.key_fields() == spelled.key_fields()


def test_places_are_not_in_the_key_and_settings_are() -> None:
    here, there = DatasetConfig.model_validate({"root": "/a"}), DatasetConfig.model_validate({"root": "/b"})
    assert here.key_fields() == there.key_fields()
    assert "heldout_fraction" in here.key_fields()


def test_habits_are_not_in_the_key() -> None:
    often = TrainConfig.model_validate({"training": {"steps": 10, "log_every": 1, "checkpoint_every": 2}})
    seldom = TrainConfig.model_validate({"training": {"steps": 10}})
    assert often.key_fields() == seldom.key_fields()
    assert often.key_fields() != TrainConfig.model_validate({"training": {"steps": 11}}).key_fields()


def test_an_imported_tokenizer_does_not_depend_on_how_one_would_train() -> None:
    imported = TokenizerConfig.model_validate({"checkpoint": "a.pt", "lpips_weight": 0.5})
    assert set(imported.key_fields()) == {"source", "model", "image_size"}
    assert imported.key_fields() == TokenizerConfig.model_validate({"checkpoint": "b.pt"}).key_fields()
    trained = TokenizerConfig.model_validate({"source": "train", "lpips_weight": 0.5})
    assert trained.key_fields() != TokenizerConfig.model_validate({"source": "train"}).key_fields()


def test_the_discriminator_comes_in_only_where_it_has_weight_and_time() -> None:
    def adversarial(**fields: Any) -> bool:
        training = {"steps": 10}
        return TokenizerConfig.model_validate({"source": "train", "training": training, **fields}).adversarial

    assert TokenizerConfig(source="train").adversarial  # LlamaGen's recipe
    assert adversarial(adversarial_start=9)
    assert not adversarial(adversarial_start=10)
    assert not adversarial(adversarial_start=0, adversarial_weight=0.0)


def test_vq8_makes_a_grid_of_an_eighth() -> None:
    vq8 = {"model": {"channel_multipliers": [1, 2, 2, 4]}, "image_size": 264}
    settings = Settings.model_validate({"tokenizer": vq8, "tokenize": {"image_size": 264}})
    assert settings.tokenize.image_size // settings.tokenizer.model.downsample == 33
