"""Thresholds against counts by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.patching import PatchRule, patch_starts
from stages.patches.thresholds import EntropySample
from stages.runtime.errors import InputError

GRID, CODES = 8, 512
TOKENS = GRID * GRID
ENTROPIES = np.random.default_rng(0).uniform(0, np.log(CODES), (60, TOKENS)).astype(np.float32)
SAMPLE = EntropySample([ENTROPIES[:40], ENTROPIES[40:]], TOKENS, CODES)
RULE = PatchRule(threshold=4.0, max_length=4, row_boundary=True, grid=GRID)


def mean_length(rule: PatchRule) -> float:
    return ENTROPIES.size / int(patch_starts(rule, torch.from_numpy(ENTROPIES)).sum())


@pytest.mark.parametrize("rule", [RULE, replace(RULE, max_length=None), replace(RULE, row_boundary=False)])
def test_the_mean_length_is_that_of_the_rule(rule: PatchRule) -> None:
    assert SAMPLE.mean_length(rule) == mean_length(rule)


@pytest.mark.parametrize("rule", [RULE, replace(RULE, max_length=8), replace(RULE, row_boundary=False)])
def test_the_threshold_found_gives_the_length_wanted_under_the_rest_of_the_rule(rule: PatchRule) -> None:
    found = SAMPLE.find_threshold(2.16, rule, "sample")
    patches = ENTROPIES.size / 2.16
    assert abs(mean_length(replace(rule, threshold=found)) - 2.16) <= 2.16 / patches
    assert SAMPLE.find_threshold(2.16, replace(rule, threshold=0.0), "sample") == found


def test_a_length_out_of_reach_names_the_range_and_the_section() -> None:
    with pytest.raises(InputError, match=r"sample\.target_mean_length is 4.0, expected 1.0000 to 3.7647.*max_length 4"):
        SAMPLE.find_threshold(4.0, RULE, "sample")


def test_the_share_above_counts_predicted_tokens() -> None:
    assert SAMPLE.share_above(4.0) == pytest.approx((ENTROPIES[:, 1:] > np.float32(4.0)).mean())
    assert SAMPLE.share_above(-1.0) == 1.0
    assert SAMPLE.share_above(7.0) == 0.0
