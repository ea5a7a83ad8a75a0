"""Sections: bounds, contradictions, names of sizes, and what enters a key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
from pydantic import ValidationError

from conf.dataset import DatasetConfig
from conf.entropy_model import EntropyModelConfig
from conf.evaluate import EvaluateConfig
from conf.patch_index import PatchIndexConfig
from conf.runtime import RuntimeConfig
from conf.sample import SampleConfig
from conf.schema import Settings
from conf.section import Section, TrainingConfig
from conf.tokenizer import TokenizerConfig
from conf.train import TrainConfig
from models.config import DPAR_SIZES, GPT_SIZES

DPAR_B = asdict(DPAR_SIZES["B"])


def all_sections(base: type[Section] = Section) -> Iterator[type[Section]]:
    for section in base.__subclasses__():
        yield section
        yield from all_sections(section)


FIELDS = {
    f"{section.__name__}.{name}": (section, field)
    for section in (*all_sections(), RuntimeConfig)
    if section.__module__.startswith("conf.")
    for name, field in section.model_fields.items()
}


@pytest.mark.parametrize("address", FIELDS)
def test_every_field_is_described_in_a_plain_line(address: str) -> None:
    section, field = FIELDS[address]
    if section is Settings and isinstance(field.annotation, type) and issubclass(field.annotation, Section):
        described = field.annotation.__doc__  # a stage's section says what it is
    else:
        described = field.description
    assert described
    assert 10 < len(described) <= 220
    assert "\n" not in described
    assert described.endswith(".")
    assert described[0].isupper()
    assert described.split()[0] not in {"Of", "Or", "As"}, "begin with the noun"


def test_every_section_is_described() -> None:
    assert len(FIELDS) > 90  # the search above finds them
    ours = [section for section in all_sections() if section.__module__.startswith("conf.")]  # tests have their own
    assert [section.__name__ for section in ours if not section.__doc__] == []


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
        (EntropyModelConfig, {"source": "checkpoint"}, "entropy_model.checkpoint None, expected the model.safetensors"),
        (TrainConfig, {"family": "dpar", "model": GPT_SIZES["B"]}, "GPTSize and train.family dpar"),
        (TrainConfig, {"model": {**DPAR_B, "num_heads": 32}}, "head width 24 .*multiple of 16 for dynamic position"),
        (TrainConfig, {"family": "npp", "npp": {"levels": 5}}, r"levels is 5 .*expected 1\.\.4"),
        (TrainConfig, {"family": "npp", "npp": {"rate": 1.0}}, "rate 1.0, expected .*0 < rate < 1"),
        (TrainConfig, {"family": "npp", "npp": {"level": 2}}, "Unexpected keyword"),
        (TrainConfig, {"family": "npp", "npp": {"epoch_steps": 0}}, "epoch_steps is 0, expected at least 1"),
        (
            TrainConfig,
            {"entropy_head": {"kind": "linear"}, "training": {"steps": 9, "warmup_steps": 0, "ema_decay": 0.9}},
            "entropy_head.kind is linear and train.training.ema_decay 0.9, expected none of the two",
        ),
        (TrainConfig, {"entropy_head": {"kind": "conv"}}, "'none', 'linear', 'mlp' or 'block'"),
        (
            TrainConfig,
            {"family": "npp", "training": {"steps": 100, "warmup_steps": 50}},
            r"warmup_steps is 50, expected fewer than the 50 .*end at steps \[50, 100\]",
        ),
        (TrainConfig, {"family": "npp", "npp": {"levels": 4}, "training": {"steps": 7}}, "fewer than the 0 steps"),
        (
            TrainConfig,
            {"npp": {"levels": 2}},
            "train.npp is set and train.family dpar, expected family npp: dpar has no such setting",
        ),
        (TrainConfig, {"source": "checkpoint"}, "train.checkpoint None, expected weights of DPAR"),
        (
            TrainConfig,
            {"source": "checkpoint", "checkpoint": "a.pt", "entropy_head": {"kind": "mlp"}},
            "entropy_head.kind is mlp and train.source checkpoint, expected none",
        ),
        (TokenizerConfig, {"weights": "average"}, "should be 'model' or 'ema'"),
        (
            TrainConfig,
            {"family": "llamagen", "npp": {"levels": 2}},
            "train.npp is set .* expected family npp: llamagen",
        ),
        (TrainConfig, {"family": "npp", "entropy_head": {"kind": "mlp"}}, "train.entropy_head .* expected family dpar"),
        (TrainConfig, {"family": "gpt"}, "train.family is 'gpt', expected one of dpar, llamagen, npp"),
        (TrainConfig, {"family": "llamagen", "model": {**DPAR_B, "depth": 3}}, "Unexpected keyword"),
        (TrainConfig, {"source": "checkpoint", "family": "npp"}, "train.checkpoint None, expected .*c2i_B_256.pt"),
        (
            Settings,
            {"tokenize": {"image_size": 240}, "train": {"family": "npp"}},
            "blocks of 2 x 2 tokens, on a grid of 15 x 15",
        ),
        (TrainConfig, {"family": "npp", "model": {"dim": 100, "num_heads": 3, "num_layers": 1}}, "multiple of 4"),
        (TrainConfig, {"model": {"dim": 64, "num_heads": 4, "num_layers": 1}}, r"num_layers\n  Unexpected keyword"),
        (Settings, {"tokenize": {"image_size": 250}}, "tokenize.image_size is 250"),
        (Settings, {"trian": {}}, "Extra inputs"),
        (SampleConfig, {"threshold": 7.8, "target_mean_length": 2.0}, "expected at most one of them"),
        (SampleConfig, {"cfg_interval": [5, 5]}, r"cfg_interval is \[5, 5\], expected \[first, last \+ 1\]"),
        (SampleConfig, {"cfg_schedule": "cosine"}, "'constant' or 'linear'"),
        (
            Settings,
            {"train": {"class_dropout_prob": 0}},
            r"class_dropout_prob is 0 and sample\.cfg_scale 2, expected class dropout or sample\.cfg_scale=1",
        ),
        (Settings, {"sample": {"cfg_interval": [0, 257]}}, r"\[0, 257\], expected at most 256, the tokens of an"),
        (
            Settings,
            {"sample": {"threshold": 7.0}, "patch_index": {"mode": "static", "static_length": 1.8}},
            r"sample\.threshold is set, .* patch_index\.mode static and .* expected a family with patches",
        ),
        (
            Settings,
            {"sample": {"max_length": 3}, "train": {"family": "llamagen"}},
            r"sample\.max_length is set, train\.family is llamagen",
        ),
        (
            Settings,
            {"sample": {"boundaries": "own_entropy"}, "patch_index": {"mode": "static", "static_length": 1.8}},
            r"patch_index\.mode static and sample\.boundaries own_entropy, expected boundaries of static: see",
        ),
        (
            Settings,
            {"sample": {"boundaries": "entropy_head"}, "entropy_head": {"kind": "none"}},
            "sample.boundaries entropy_head, expected boundaries of entropy_model or own_entropy or static",
        ),
        (
            Settings,
            {"sample": {"boundaries": "static"}, "train": {"family": "llamagen"}},
            "sample.boundaries static, expected boundaries of none",
        ),
        (SampleConfig, {"boundaries": "guess"}, "'guess', expected one of entropy_head, entropy_model, own_entropy"),
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


@pytest.mark.parametrize("family", ["llamagen", "npp"])
def test_a_dpar_size_means_the_baseline_of_the_same_width_and_depth(family: str) -> None:
    for name in ("B", "L", "XL", "XXL"):
        assert (
            TrainConfig.model_validate({"family": family, "model": asdict(DPAR_SIZES[name])}).model == GPT_SIZES[name]
        )
        assert TrainConfig.model_validate({"family": family, "model": name}).model == GPT_SIZES[name]
    default = TrainConfig.model_validate({"family": family})
    assert default.model == GPT_SIZES["B"]
    assert TrainConfig.model_validate(default.model_dump(mode="json")) == default


def test_a_familys_key_holds_its_own_settings_and_no_other_familys() -> None:
    def key(**fields: Any) -> dict[str, Any]:
        return TrainConfig.model_validate(fields).key_fields()

    common = {"family", "source", "model", "training", "dropout", "class_dropout_prob", "seed"}
    assert set(key()) == common | {"position_embedding", "entropy_head"}
    assert set(key(family="llamagen")) == common
    assert set(key(family="npp")) == common | {"npp"}
    assert key(position_embedding="patch_index_1d") != key()
    assert key(family="npp", npp={"levels": 3}) != key(family="npp")
    assert key(entropy_head={"weight": 2.0}) == key(), "there is no head"
    assert key(entropy_head={"kind": "block", "weight": 2.0}) != key(entropy_head={"kind": "block"}) != key()


@pytest.mark.parametrize(
    ("fields", "source", "read"),
    [
        ({}, "entropy_head", {"patch_index", "entropy_head"}),
        ({"entropy_head": {"kind": "none"}}, "entropy_model", {"patch_index", "entropy_model"}),
        (
            {"entropy_head": {"kind": "none"}, "train": {"entropy_head": {"kind": "mlp"}}},
            "entropy_head",
            {"patch_index", "entropy_head"},
        ),
        ({"sample": {"boundaries": "own_entropy"}}, "own_entropy", {"patch_index", "entropy_head"}),
        (
            {"sample": {"boundaries": "entropy_model", "target_mean_length": 2.0}},
            "entropy_model",
            {"patch_index", "entropy_model", "entropy_map"},
        ),
        ({"sample": {"target_mean_length": 2.0}}, "entropy_head", {"patch_index", "entropy_head"}),
        ({"patch_index": {"mode": "static", "static_length": 1.8}}, "static", {"patch_index"}),
        ({"train": {"family": "llamagen"}}, None, set()),
    ],
)
def test_null_resolves_to_the_best_source_there_is_and_only_it_is_read(
    fields: dict[str, Any], source: str | None, read: set[str]
) -> None:
    settings = Settings.model_validate(fields)
    assert settings.sample.boundaries == source
    deciding = {"entropy_model", "entropy_map", "patch_index", "entropy_head"}
    assert deciding - settings.sample.unread_inputs(settings) == read


def test_an_imported_transformer_does_not_depend_on_how_one_would_train() -> None:
    imported = {"family": "llamagen", "model": "L", "source": "checkpoint", "checkpoint": "a.pt"}
    key = TrainConfig.model_validate(imported).key_fields()
    assert key == {"source": "checkpoint", "family": "llamagen", "model": asdict(GPT_SIZES["L"])}
    other = {"checkpoint": "b.pt", "dropout": 0.5, "seed": 3, "training": {"steps": 1}}
    assert TrainConfig.model_validate(imported | other).key_fields() == key


@pytest.mark.parametrize(
    ("section", "fields", "shape"),
    [
        (TokenizerConfig, {}, {"source", "model", "image_size"}),
        (EntropyModelConfig, {}, {"source", "model"}),
        (TrainConfig, {"family": "llamagen"}, {"source", "family", "model"}),
        (TrainConfig, {"family": "dpar"}, {"source", "family", "model", "position_embedding"}),
    ],
)
def test_which_weights_are_taken_is_in_the_key_of_an_import_and_of_nothing_else(
    section: type[Section], fields: dict[str, Any], shape: set[str]
) -> None:
    def key(**changes: Any) -> dict[str, Any]:
        return section.model_validate(fields | changes).key_fields()

    imported: dict[str, Any] = {"source": "checkpoint", "checkpoint": "a.pt"}
    assert set(key(**imported)) == shape
    assert key(**imported, weights="ema") == key(**imported) | {"weights": "ema"}
    assert key(source="train", weights="ema") == key(source="train")
    assert not {"weights", "checkpoint"} & set(key(source="train"))


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


def test_no_class_dropout_is_accepted_without_guidance_and_for_imported_weights() -> None:
    for train, sample in (
        ({"class_dropout_prob": 0}, {"cfg_scale": 1}),
        ({"class_dropout_prob": 0, "source": "checkpoint", "checkpoint": "model.safetensors"}, {"cfg_scale": 2}),
    ):
        assert Settings.model_validate({"train": train, "sample": sample}).train.can_be_guided == ("source" in train)
