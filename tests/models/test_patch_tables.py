"""The tables give what Algorithm 1 gives, token after token, for every grid, limit and number of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.patch_tables import PatchTables, pack_bits, unpack_bits
from models.patching import PatchRule, patch_starts


def algorithm_1(entropies: list[float], rule: PatchRule) -> list[bool]:
    """The paper's loop. An entropy that is no number is not below the threshold, so it opens a patch."""
    starts, length = [True, True], 1
    for i in range(2, len(entropies)):
        goes_on = entropies[i] <= rule.threshold and (rule.max_length is None or length < rule.max_length)
        if rule.row_boundary and i % rule.grid == 0:
            goes_on = False
        starts.append(not goes_on)
        length = length + 1 if goes_on else 1
    return starts


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    grid=st.sampled_from([2, 3, 5, 8, 11, 16]),
    max_length=st.one_of(st.none(), st.integers(1, 20)),
    row_boundary=st.booleans(),
    data=st.data(),
)
def test_the_starts_are_those_of_algorithm_1(
    grid: int, max_length: int | None, row_boundary: bool, data: st.DataObject
) -> None:
    rule = PatchRule(1.0, max_length, row_boundary, grid)
    share = data.draw(st.sampled_from([0.05, 0.3, 0.8]))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    high = np.array([1.5, np.inf, np.nan, np.nextafter(np.float32(1), np.float32(2))], dtype=np.float32)
    low = np.array([0.0, 0.5, 1.0, -np.inf], dtype=np.float32)
    shape = (3, grid * grid)
    entropies = np.where(generator.random(shape) < share, generator.choice(high, shape), generator.choice(low, shape))
    packed = PatchTables.of(rule, grid * grid).packed_starts(entropies)
    assert packed.shape == (3, -(-grid * grid // 8))
    assert unpack_bits(packed, grid * grid).tolist() == [algorithm_1(row, rule) for row in entropies.tolist()]
    assert np.array_equal(pack_bits(unpack_bits(packed, grid * grid)), packed)  # no bit beyond the last token


@pytest.mark.parametrize("grid", [8, 16, 24, 32])
@pytest.mark.parametrize("max_length", [1, 4, 6, 300, None])
@pytest.mark.parametrize("row_boundary", [True, False])
def test_tables_and_tensors_agree_on_every_grid_of_the_paper(
    grid: int, max_length: int | None, row_boundary: bool
) -> None:
    rule = PatchRule(7.8, max_length, row_boundary, grid)
    entropies = np.random.default_rng(grid).uniform(0, 9.7, (50, grid * grid)).astype(np.float32)
    entropies[::3] *= 0.8  # and some images with hardly a cut
    packed = PatchTables.of(rule, grid * grid).packed_starts(entropies)
    expected = patch_starts(rule, torch.from_numpy(entropies)).numpy()
    assert np.array_equal(unpack_bits(packed, grid * grid), expected)


def test_every_pattern_of_cuts_in_a_row_is_right() -> None:
    """All 2^16 rows of the 256 px grid, each behind a first row that leaves a patch open at its end."""
    rule = PatchRule(1.0, 4, False, 16)
    patterns = unpack_bits(np.arange(2**16, dtype="<u2").view(np.uint8).reshape(-1, 2), 16)
    for length in range(1, 5):
        entropies = np.zeros((2**16, 32), dtype=np.float32)
        entropies[:, 16 - length] = 2.0
        entropies[:, 16:] = 2.0 * patterns
        packed = PatchTables.of(rule, 32).packed_starts(entropies)
        assert np.array_equal(unpack_bits(packed, 32), patch_starts(rule, torch.from_numpy(entropies)).numpy())


def test_the_threshold_is_compared_as_float32() -> None:
    entropies = np.full((1, 16), 7.8, dtype=np.float32)  # as float64 it is above 7.8
    tables = PatchTables.of(PatchRule(7.8, None, False, 4), 16)
    assert unpack_bits(tables.packed_starts(entropies), 16).sum() == 2
    assert unpack_bits(tables.packed_starts(np.nextafter(entropies, np.float32(9))), 16).all()
