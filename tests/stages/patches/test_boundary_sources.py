"""A source of boundaries is an entry in the tables: one that goes by the number of the token before is added here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.boundary_sources import BOUNDARY_SOURCES, SourceInfo, calibrated_sources, for_every_source
from conf.load import load_settings
from conf.schema import Settings
from models.boundaries import NextTokens, RuleBoundaries
from models.patching import PatchRule, patch_starts
from pipeline.graph import STAGES, inputs_read
from stages.patches.boundary_sources import CALIBRATIONS, SOURCES, EntropySource
from stages.patches.thresholds import EntropySample
from stages.runtime.job import Inputs
from stages.sampling.sampler import Sampler
from stages.stores.tokens import TokenStore

CODES = 64


def surprise(tokens: Tensor) -> Tensor:
    """A stand-in for the entropy of the token after each of `tokens`, nats."""
    return tokens.float() * (math.log(CODES) / CODES)


class NumberBoundaries(RuleBoundaries):
    """The rule on the number of the token before."""

    def entropies(self, tokens: NextTokens) -> Tensor:
        return surprise(tokens.previous)


def training_surprises(inputs: Inputs) -> EntropySample:
    store = TokenStore.of(inputs)
    rows = np.arange(store.num_train)
    tokens = torch.from_numpy(store.fetch(rows, rows * 0).astype(np.int64))
    found = torch.cat([torch.full_like(tokens[:, :1], CODES), tokens[:, :-1]], dim=1)
    return EntropySample.of_array(surprise(found).numpy(), store.codebook_size)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, image_root: Path) -> Callable[..., Settings]:
    """Settings that name the source, with more settings of sampling."""
    info = SourceInfo(
        label="number",
        meaning="the number of the token before",
        needs=frozenset({"entropies"}),
        reads=frozenset(),
        reads_for_target=frozenset(),
    )
    source = EntropySource(
        load=lambda given, rule: (NumberBoundaries(rule), None),
        threshold=lambda given: 2.5,
        entropies=training_surprises,
    )
    monkeypatch.setitem(BOUNDARY_SOURCES, "number", info)
    monkeypatch.setitem(SOURCES, "number", source)

    def make(*overrides: str) -> Settings:
        return load_settings("tiny", None, [f"dataset.root={image_root}", "sample.boundaries=number", *overrides])[0]

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "threshold"), [((), 2.5), (("sample.threshold=1.5",), 1.5)])
def test_a_new_source_decides_by_the_patch_indexs_rule(
    settings: Callable[..., Settings], tiny_artifacts: dict[str, Path], overrides: tuple[str, ...], threshold: float
) -> None:
    chosen = settings(*overrides)
    read = inputs_read(STAGES["sample"], chosen)
    assert {"patch_index", "entropy_head", "entropy_model", "entropy_map"} & set(read) == {"patch_index"}
    inputs = {name: tiny_artifacts[name] for name in read}
    sampler = Sampler.load(chosen.sample, inputs, TokenStore.of(inputs), torch.device("cpu"))
    found = sampler.sample(np.arange(3), np.arange(3))
    tokens = torch.from_numpy(found["tokens"].astype(np.int64))
    entropies = torch.cat([torch.zeros(3, 1), surprise(tokens[:, :-1])], dim=1)
    expected = patch_starts(PatchRule(threshold, 4, True, 8), entropies)
    assert np.array_equal(found["patch_starts"], expected.numpy())
    assert 3 * 8 < found["patch_starts"].sum() < 3 * 64


def test_its_threshold_is_found_on_what_it_says_of_training_images(
    settings: Callable[..., Settings], tiny_artifacts: dict[str, Path]
) -> None:
    chosen = settings("sample.target_mean_length=2.0")
    sampler = Sampler.load(chosen.sample, tiny_artifacts, TokenStore.of(tiny_artifacts), torch.device("cpu"))
    assert isinstance(sampler.boundaries, NumberBoundaries)
    rule = sampler.boundaries.rule
    reached = training_surprises(tiny_artifacts).mean_length(rule)
    assert reached == pytest.approx(2.0, abs=0.1)
    for step in (-1, 1):  # the numbers are whole: the next threshold that changes anything is one away
        other = replace(rule, threshold=rule.threshold + step * math.log(CODES) / CODES)
        assert abs(training_surprises(tiny_artifacts).mean_length(other) - 2.0) >= abs(reached - 2.0)


def test_a_source_without_an_entry_fails_where_the_table_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(CALIBRATIONS) == calibrated_sources() == ["entropy_head", "own_entropy"]
    assert set(SOURCES) == set(BOUNDARY_SOURCES)
    monkeypatch.setitem(BOUNDARY_SOURCES, "more", replace(BOUNDARY_SOURCES["own_entropy"], label="more"))
    with pytest.raises(AssertionError, match="more"):
        for_every_source(SOURCES)
    with pytest.raises(AssertionError, match="more"):
        for_every_source(CALIBRATIONS, calibrated=True)
