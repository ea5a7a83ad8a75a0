"""Boundaries of finished models: the source that the settings name, its own threshold, and nothing else read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.schema import SampleConfig, Section, Settings
from models.boundaries import EntropyBoundaries, EntropyHeadBoundaries, GivenBoundaries, OwnEntropyBoundaries
from models.patching import PatchRule, static_patch_starts
from stages.artifact import read_json, write_json
from stages.boundaries import Chosen, choose_boundaries
from stages.drawing import Drawer
from stages.errors import InputError
from stages.stores.entropies import EntropyStore
from stages.stores.samples import SampleStore
from stages.stores.tokens import TokenStore
from stages.thresholds import EntropySample

CPU = torch.device("cpu")
Run = Callable[[str, Section, dict[str, Path]], Path]


def choose(inputs: dict[str, Path], config: SampleConfig, **changes: object) -> Chosen:
    store = TokenStore.open(inputs["tokenize"] / "tokens.zarr")
    return choose_boundaries(SampleConfig(**config.model_dump() | changes), inputs, store, CPU)


@pytest.fixture
def headless(tiny_artifacts: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Artifacts of a model without a head."""
    write_json(tmp_path / "headless/config.json", None)
    return tiny_artifacts | {"entropy_head": tmp_path / "headless"}


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("auto", EntropyHeadBoundaries),
        ("entropy_head", EntropyHeadBoundaries),
        ("entropy_model", EntropyBoundaries),
        ("own_entropy", OwnEntropyBoundaries),
        ("static", GivenBoundaries),
    ],
)
def test_the_source_is_the_one_named_and_draws(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, source: str, kind: type
) -> None:
    config = SampleConfig(**tiny_settings.sample.model_dump() | {"boundaries": source})
    drawer = Drawer.load(config, tiny_artifacts, TokenStore.open(tiny_artifacts["tokenize"] / "tokens.zarr"), CPU)
    assert drawer.chosen is not None
    assert isinstance(drawer.chosen.boundaries, kind)
    assert source in ("auto", drawer.chosen.source)
    starts = drawer.draw(np.arange(2), np.array([0, 2]))["patch_starts"]
    assert 1 < starts.size / starts.sum() < 4


def test_without_a_head_the_entropy_model_decides_and_a_head_cannot(
    headless: dict[str, Path], tiny_settings: Settings
) -> None:
    assert choose(headless, tiny_settings.sample).source == "entropy_model"
    with pytest.raises(InputError, match=r"boundaries is entropy_head and .* holds none, expected a model with a head"):
        choose(headless, tiny_settings.sample, boundaries="entropy_head")


def test_with_a_head_the_entropy_model_is_not_even_opened(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, tmp_path: Path, run_in_process: Run
) -> None:
    alone = {name: tiny_artifacts[name] for name in ("dataset", "tokenizer", "tokenize", "patch_index", "train")}
    gone = alone | {"entropy_head": tiny_artifacts["entropy_head"], "entropy_map": tiny_artifacts["entropy_map"]}
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    for inputs in (gone | {"entropy_model": tmp_path / "missing"}, gone | {"entropy_model": tmp_path}):
        output = run_in_process("sample", tiny_settings.sample, inputs)
        drawn = SampleStore.open(output / "samples.zarr")
        assert np.array_equal(drawn.tokens, SampleStore.open(tiny_artifacts["sample"] / "samples.zarr").tokens)
    bare = alone | {"entropy_head": tiny_artifacts["entropy_head"]}
    assert choose(bare, tiny_settings.sample).source == "entropy_head"
    assert choose(bare, tiny_settings.sample, boundaries="own_entropy").source == "own_entropy"


@pytest.mark.parametrize("source", ["entropy_head", "entropy_model", "own_entropy"])
def test_the_rule_is_the_patch_indexs_with_the_sources_own_threshold_unless_the_settings_name_another(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, source: str
) -> None:
    def chosen(**changes: object) -> tuple[PatchRule, EntropySample]:
        found = choose(tiny_artifacts, tiny_settings.sample, boundaries=source, **changes)
        assert found.rule is not None
        assert found.sample is not None
        return found.rule, found.sample

    saved = read_json(tiny_artifacts["patch_index"] / "rule.json")
    thresholds = read_json(tiny_artifacts["entropy_head"] / "thresholds.json")
    thresholds["entropy_model"] = saved["threshold"]
    assert chosen()[0] == PatchRule(thresholds[source], 4, True, 8)
    assert chosen(threshold=1.25, max_length=6)[0] == PatchRule(1.25, 6, True, 8)
    rule, sample = chosen(target_mean_length=2.5, max_length=6)
    assert rule.max_length == 6
    assert sample.mean_length(rule) == pytest.approx(2.5, abs=0.01)
    with pytest.raises(InputError, match=r"sample\.target_mean_length is 4\.5, expected 1\.0+ to 3\.\d+"):
        chosen(target_mean_length=4.5)


def test_the_entropy_models_sample_is_the_entropy_map(tiny_artifacts: dict[str, Path], tiny_settings: Settings) -> None:
    found = choose(tiny_artifacts, tiny_settings.sample, boundaries="entropy_model").sample
    wanted = EntropySample.of(EntropyStore.open(tiny_artifacts["entropy_map"] / "entropies.zarr"))
    assert found is not None
    assert all(np.array_equal(*pair) for pair in zip(found.blocks, wanted.blocks, strict=True))


def test_static_patches_of_a_model_by_entropy_have_the_indexs_mean_length(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings
) -> None:
    boundaries = choose(tiny_artifacts, tiny_settings.sample, boundaries="static").boundaries
    assert isinstance(boundaries, GivenBoundaries)
    mean_length = read_json(tiny_artifacts["patch_index"] / "rule.json")["mean_length"]
    assert torch.equal(boundaries.starts, static_patch_starts(mean_length, 64))


def test_a_static_patch_index_takes_no_threshold_and_no_other_source(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, tmp_path: Path
) -> None:
    write_json(tmp_path / "rule.json", {"mode": "static", "static_length": 2.0})
    inputs = tiny_artifacts | {"patch_index": tmp_path}
    boundaries = choose(inputs, tiny_settings.sample).boundaries
    assert isinstance(boundaries, GivenBoundaries)
    assert torch.equal(boundaries.starts, static_patch_starts(2.0, 64))
    asked = {"threshold": 1.0, "max_length": 4, "target_mean_length": 2.0, "boundaries": "own_entropy"}
    for name, value in asked.items():
        with pytest.raises(InputError, match=rf"sample\.{name} is set and the patch index has static patches"):
            choose(inputs, tiny_settings.sample, **{name: value})
