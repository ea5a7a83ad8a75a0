"""The patch rule: Algorithm 1 as written, the vectorised rule and the online one are the same."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.patching import PatchRule, opens_patch, patch_starts, static_patch_starts


def algorithm_1(entropies: list[float], threshold: float, max_length: int | None, row: int | None) -> list[bool]:
    """The paper's loop: patch after patch, token after token."""
    starts = [True, True]
    length = 1
    for i in range(2, len(entropies)):
        goes_on = entropies[i] <= threshold and (max_length is None or length < max_length)
        if row is not None and i % row == 0:
            goes_on = False
        starts.append(not goes_on)
        length = length + 1 if goes_on else 1
    return starts


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    grid=st.integers(2, 6),
    max_length=st.one_of(st.none(), st.integers(1, 9)),
    row_boundary=st.booleans(),
    data=st.data(),
)
def test_offline_online_and_algorithm_1_agree(
    grid: int, max_length: int | None, row_boundary: bool, data: st.DataObject
) -> None:
    values = st.sampled_from([0.0, 0.5, 1.0, 1.5, float("nan"), float("inf")])
    entropies = data.draw(st.lists(values, min_size=grid * grid, max_size=grid * grid))
    rule = PatchRule(1.0, max_length, row_boundary, grid)
    expected = algorithm_1(entropies, 1.0, max_length, grid if row_boundary else None)
    assert patch_starts(rule, torch.tensor([entropies]))[0].tolist() == expected
    online, length = [True], torch.ones(1, dtype=torch.int64)
    for position in range(1, grid * grid):
        opened = opens_patch(rule, torch.tensor([position]), torch.tensor([entropies[position]]), length)
        length = torch.where(opened, 1, length + 1)
        online.append(bool(opened))
    assert online == expected


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    grid=st.integers(2, 12),
    max_length=st.one_of(st.none(), st.integers(1, 30)),
    row_boundary=st.booleans(),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_patches_cover_the_image_keep_the_limit_and_begin_with_rows(
    grid: int, max_length: int | None, row_boundary: bool, share: float, seed: int
) -> None:
    entropies = torch.rand(4, grid * grid, generator=torch.Generator().manual_seed(seed))
    starts = patch_starts(PatchRule(share, max_length, row_boundary, grid), entropies)
    assert starts[:, :2].all()
    for row, entropy in zip(starts, entropies, strict=True):
        first = row.nonzero()[:, 0]
        lengths = first.diff(append=torch.tensor([grid * grid]))
        assert int(lengths.sum()) == grid * grid
        assert int(lengths.min()) >= 1
        assert max_length is None or int(lengths.max()) <= max_length
        assert row[entropy > torch.tensor(share)].all(), "an uncertain token always opens a patch"
        if row_boundary:
            assert row[::grid].all()
            assert int(lengths.max()) <= grid


@pytest.mark.parametrize(("grid", "fewest"), [(16, 65), (24, 145)])
def test_a_threshold_never_reached_gives_the_fewest_patches_and_always_reached_all(grid: int, fewest: int) -> None:
    entropies = torch.rand(3, grid * grid)
    assert (patch_starts(PatchRule(99.0, 4, True, grid), entropies).sum(dim=1) == fewest).all()
    assert patch_starts(PatchRule(-1.0, 4, True, grid), entropies).all()


def test_the_threshold_is_compared_as_float32_and_equality_goes_on() -> None:
    entropies = torch.full((1, 16), 7.8, dtype=torch.float32)  # as float64 it is above 7.8
    assert patch_starts(PatchRule(7.8, None, False, 4), entropies).sum() == 2
    above = torch.nextafter(entropies, torch.tensor(100.0))
    assert patch_starts(PatchRule(7.8, None, False, 4), above).all()


@pytest.mark.parametrize(("length", "patches"), [(1.0, 256), (2.0, 128), (1.8191, 141), (256.0, 1)])
def test_static_patches_have_their_length(length: float, patches: int) -> None:
    starts = static_patch_starts(length, 256)
    exact = Fraction(str(length))
    assert starts.nonzero()[:, 0].tolist() == [math.ceil(number * exact) for number in range(patches)]
