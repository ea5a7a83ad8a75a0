"""Layers of settings, and the one line that a wrong one gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from conf.load import SettingsError, describe, load_settings, names
from conf.schema import Settings
from conf.train import DPARSettings, LlamaGenSettings, NPPSettings
from models.config import DPAR_SIZES, GPT_SIZES


def test_later_layers_win() -> None:
    settings, runtime = load_settings(
        "demo", None, ["patch_index.target_mean_length=2.0", "runtime.processes=2", "train.training.learning_rate=1e-4"]
    )
    assert settings.dataset.source == "twemoji"
    assert settings.patch_index.target_mean_length == 2.0
    assert settings.train.training.learning_rate == 1e-4
    assert runtime.processes == 2


def test_the_runs_seed_is_that_of_every_section_without_one_of_its_own() -> None:
    settings, _ = load_settings("tiny", None, ["seed=3", "train.seed=5", "sample.seed=null"])
    seeds = {name: section.seed for name, section in settings if hasattr(section, "seed")}
    assert seeds == {
        "tokenizer": 3,
        "entropy_model": 3,
        "train": 5,
        "entropy_head": 3,
        "sample": 3,
        "evaluate": 3,
    }
    assert Settings.model_validate(settings.model_dump(mode="json")) == settings
    assert {section.seed for _, section in load_settings("tiny")[0] if hasattr(section, "seed")} == {0}


def test_keys_see_a_sections_seed_wherever_it_came_from() -> None:
    shared, own = load_settings("tiny", None, ["seed=3"])[0], load_settings("tiny", None, ["train.seed=3"])[0]
    plain = load_settings("tiny")[0]
    assert shared.train.key_fields() == own.train.key_fields()
    assert shared.train.key_fields() != plain.train.key_fields()
    assert shared.tokenize.key_fields() == plain.tokenize.key_fields()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.modle=B", "train.modle: unknown setting"),
        ("patch_index.threshold=high", "patch_index.threshold.*found 'high'"),
        ("train.training.steps=0", "train.training.steps.*greater than 0, found 0"),
        ("patch_index.target_mean_length=2", "threshold, target_mean_length"),
        ("threshold=7", "expected stage.field=value or seed=value"),
        ("train=7", "expected stage.field=value or seed=value"),
        ("seed=-1", "seed: .*greater than or equal to 0, found -1"),
        ("train.seed=9223372036854775808", "train.seed: .*less than 9223372036854775808"),
        ("patch_index.threshold", "expected stage.field=value"),
        ("patch_index.threshold=[1", r"patch_index.threshold: expected a decimal number .* or null, found '\[1'"),
        ("train.training.steps=1e3", "train.training.steps: expected a whole number such as 10, found '1e3'"),
        ("train.training.steps=010", "found '010'"),
        ("patch_index.row_boundary=yes", "patch_index.row_boundary: expected true or false, found 'yes'"),
        ("train.model.global_layers=08", "train.model.global_layers: expected a whole number"),
        ("sample.cfg_interval=[a, b]", "sample.cfg_interval: expected JSON, with strings in double quotes"),
        ("train.training.steps=null", "train.training.steps: .*found None"),
        ("train.family=null", "train.family is 'null', expected one of dpar"),
        ("runtime.processes=0", "runtime.processes: .*greater than 0"),
        ("runtime.checkpoint_minutes=1e400", "runtime.checkpoint_minutes: expected a decimal number"),
        ("runtime.device=tpu", "device.*found 'tpu'"),
    ],
)
def test_a_wrong_override_is_one_line_with_its_address(override: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        load_settings(None, None, [override])
    assert "\n" not in str(caught.value)


def test_a_preset_stands_for_another_family_without_its_own_familys_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for kind in ("preset", "ablation"):
        (tmp_path / kind).mkdir()
    (tmp_path / "base.yaml").write_text("train:\n  training:\n    steps: 9\n")
    (tmp_path / "preset/p.yaml").write_text("train:\n  model: L\n  position_embedding: patch_index_1d\n")
    (tmp_path / "ablation/llamagen.yaml").write_text("train:\n  family: llamagen\n")
    (tmp_path / "ablation/positions.yaml").write_text("train:\n  position_embedding: dynamic_no_redundancy\n")
    monkeypatch.setattr("conf.load.CONF_DIR", tmp_path)
    for arguments in (("p", "llamagen"), ("p", None, ["train.family=llamagen"])):
        section = load_settings(*arguments)[0].train
        assert isinstance(section, LlamaGenSettings)
        assert (section.model, section.training.steps) == (GPT_SIZES["L"], 9)
    own = load_settings("p")[0].train
    assert isinstance(own, DPARSettings)
    assert own.position_embedding == "patch_index_1d"
    for ablation, overrides in (
        ("positions", ["train.family=llamagen"]),
        ("llamagen", ["train.position_embedding=dynamic"]),
    ):
        with pytest.raises(SettingsError, match=r"train\.position_embedding is set and train\.family llamagen"):
            load_settings("p", ablation, overrides)


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Write presets, given as YAML by name, over a base of nine steps."""
    for kind in ("preset", "ablation"):
        (tmp_path / kind).mkdir()
    (tmp_path / "base.yaml").write_text(
        "train: {training: {steps: 9}}\nfamilies: {npp: {seed: 4, evaluate: {seed: 5}}}"
    )
    monkeypatch.setattr("conf.load.CONF_DIR", tmp_path)

    def write(**presets: str) -> None:
        for name, text in presets.items():
            (tmp_path / "preset" / f"{name}.yaml").write_text(text)

    return write


def test_a_preset_changes_the_one_that_it_extends(layers: Callable[..., None]) -> None:
    layers(
        first="train: {model: L, dropout: 0.2}",
        second="extends: first\ntrain: {dropout: 0.3}",
        third="extends: second\ntrain: {seed: 1}",
    )
    section = load_settings("third", None, ["train.seed=2"])[0].train
    assert isinstance(section, DPARSettings)
    assert (section.model, section.dropout, section.seed, section.training.steps) == (DPAR_SIZES["L"], 0.3, 2, 9)


def test_what_cannot_be_extended_is_one_line(layers: Callable[..., None]) -> None:
    layers(a="extends: b", b="extends: a", lost="extends: nowhere")
    with pytest.raises(SettingsError, match="preset a extends b extends a, expected"):
        load_settings("a")
    with pytest.raises(SettingsError, match="preset is 'nowhere', expected one of a, b, lost"):
        load_settings("lost")


def test_settings_of_a_family_are_laid_over_its_preset_and_under_changes(layers: Callable[..., None]) -> None:
    layers(
        p="seed: 1\nfamilies: {npp: {evaluate: {seed: 6}, train: {npp: {levels: 3}}}, dpar: {train: {model: L}}}",
        q="extends: p\nfamilies: {npp: {train: {npp: {rate: 0.4}}}}",
    )
    plain = load_settings("q")[0]
    assert (plain.seed, plain.train.model) == (1, DPAR_SIZES["L"])
    for overrides, levels in (([], 3), (["train.npp.levels=1"], 1)):
        settings = load_settings("q", None, ["train.family=npp", *overrides])[0]
        assert isinstance(settings.train, NPPSettings)
        assert (settings.seed, settings.evaluate.seed, settings.train.npp.levels) == (4, 6, levels)
        assert settings.train.npp.rate == 0.4
    layers(p="families: {gpt: {seed: 1}}")
    with pytest.raises(SettingsError, match="families has settings for gpt, expected one of dpar, llamagen, npp"):
        load_settings("p")


def test_unknown_presets_and_ablations_name_those_there_are() -> None:
    with pytest.raises(SettingsError, match=r"preset is 'dmo', expected one of .*demo"):
        load_settings("dmo")
    with pytest.raises(SettingsError, match="ablation is 'x'"):
        load_settings("demo", "x")


@pytest.mark.parametrize("preset", names("preset"))
def test_every_preset_loads_and_says_what_it_is_for(preset: str) -> None:
    load_settings(preset)
    assert describe("preset", preset).endswith(".")


@pytest.mark.parametrize("ablation", names("ablation"))
def test_every_ablation_changes_the_demo(ablation: str) -> None:
    assert load_settings("demo", ablation)[0] != load_settings("demo")[0]
    assert describe("ablation", ablation).endswith(".")


@pytest.mark.parametrize("family", ["dpar", "llamagen", "npp"])
def test_a_text_is_read_as_the_field_of_the_chosen_family_says(family: str) -> None:
    own = {"dpar": "train.entropy_head.weight=2", "llamagen": "train.source=train", "npp": "train.npp.rate=0.25"}[
        family
    ]
    load_settings(overrides=[own, f"train.family={family}"])
    with pytest.raises(SettingsError, match=r"train\.model\.dim: expected a whole number such as 10, found '0x40'"):
        load_settings(overrides=["train.model.dim=0x40", f"train.family={family}"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {training: {steps: 010}}", "train.training.steps: Input should be a valid integer, found '010'"),
        ("train: {training: {steps: '9'}}", "train.training.steps: Input should be a valid integer, found '9'"),
        ("train: {training: {steps: 9.0}}", "train.training.steps: Input should be a valid integer, found 9.0"),
        ("train: {training: {steps: true}}", "train.training.steps: Input should be a valid integer, found True"),
        ("train: {training: {betas: [0.9, '0.95']}}", "train.training.betas.1: Input should be a valid number"),
        ("train: {model: {dim: '64', num_heads: 2}}", "train.model.dim: Input should be a valid integer, found '64'"),
        ("tokenizer: {model: {channels: 64.0}}", "tokenizer.model.channels: Input should be a valid integer"),
        ("tokenizer: {model: {channel_multipliers: [1, 2.0]}}", "tokenizer.model.channel_multipliers.1: Input"),
        ("patch_index: {row_boundary: yes}", "patch_index.row_boundary: Input should be a valid boolean, found 'yes'"),
        ("patch_index: {row_boundary: 1}", "patch_index.row_boundary: Input should be a valid boolean, found 1"),
        ("patch_index: {threshold: '7.8'}", "patch_index.threshold: Input should be a valid number, found '7.8'"),
        ("sample: {labels: 1}", "sample.labels: "),
        ("dataset: {root: 5}", "dataset.root: found 5, expected the path"),
        ("runtime: {processes: '2'}", "runtime.processes: Input should be a valid integer, found '2'"),
        ("runtime: 5", "runtime is 5, expected settings by name"),
        ("train: 5", "train is 5, expected settings by name"),
        ("train: {family: [dpar]}", r"train.family is \['dpar'\], expected one of"),
        ("sample: [1]", "sample: "),
        ("families: [npp]", r"families is \['npp'\], expected settings by name"),
        ("families: {dpar: 5}", "dpar is 5, expected settings by name"),
        ("seed: 1\nseed: 2", "line 2: seed is set twice"),
        ("extends: [a]", "preset is \\['a'\\], expected one of"),
    ],
)
def test_a_preset_with_a_value_of_another_kind_is_one_line(text: str, words: str, layers: Callable[..., None]) -> None:
    layers(p=text)
    with pytest.raises(SettingsError, match=words) as caught:
        load_settings("p")
    assert "\n" not in str(caught.value)


def test_sections_without_settings_are_those_of_the_defaults(layers: Callable[..., None]) -> None:
    layers(p="runtime:\nfamilies:\n")
    assert load_settings("p")[0] == load_settings()[0]
