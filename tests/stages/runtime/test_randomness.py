"""Random numbers are functions of (seed, purpose, index): streams differ, and nothing drawn before matters."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis.strategies import integers, lists, sampled_from, tuples

from stages.runtime.randomness import Purpose, choices, seed_torch, stream, torch_seed

LARGEST_SEED, LARGEST_INDEX = 2**63 - 1, 2**64 - 1
NEAR = integers(0, 3) | integers(LARGEST_SEED - 3, LARGEST_SEED) | integers(0, LARGEST_SEED)
ADDRESSES = tuples(NEAR, sampled_from(Purpose), integers(0, 3) | integers(0, LARGEST_INDEX), integers(0, 3) | NEAR)


def first_words(seed: int, purpose: Purpose, index: int, part: int) -> tuple[int, ...]:
    return tuple(stream(seed, purpose, index, part).integers(2**64, size=4, dtype=np.uint64).tolist())


@pytest.mark.slow
@given(addresses=lists(ADDRESSES, min_size=2, max_size=20, unique=True))
@example(addresses=[(0, Purpose.LABELS, 0, 1), (0, Purpose.LABELS, 1, 0), (1, Purpose.LABELS, 0, 0)])
@example(addresses=[(1, Purpose.TOKENS, 0, 0), (2, Purpose.LABELS, 0, 0)])
@example(addresses=[(0, Purpose.EPOCHS, LARGEST_INDEX, 0), (0, Purpose.EPOCHS, 0, 0)])
def test_no_two_streams_share_a_first_word(addresses: list[tuple[int, Purpose, int, int]]) -> None:
    words = [first_words(*address) for address in addresses]
    for place in range(4):
        assert len({word[place] for word in words}) == len(addresses)


def test_near_addresses_give_streams_that_share_no_word_at_all() -> None:
    words = np.concatenate(
        [
            stream(seed, purpose, index, part).integers(2**64, size=500, dtype=np.uint64)
            for seed, purpose, index, part in itertools.product(
                (0, 1), (Purpose.LABELS, Purpose.TOKENS), (0, 1), (0, 1)
            )
        ]
    )
    assert len(np.unique(words)) == 16 * 500


@given(addresses=lists(ADDRESSES, min_size=2, max_size=6, unique=True))
def test_what_was_drawn_before_changes_nothing(addresses: list[tuple[int, Purpose, int, int]]) -> None:
    forwards = {address: first_words(*address) for address in addresses}
    assert {address: first_words(*address) for address in reversed(addresses)} == forwards
    generators = [stream(*address) for address in addresses]  # alternating draws of streams that live side by side
    draws = [[int(generator.integers(2**64, dtype=np.uint64)) for generator in generators] for _ in range(4)]
    assert list(zip(*draws, strict=True)) == list(forwards.values())


def test_a_purpose_has_one_number() -> None:
    assert len(Purpose.__members__) == len(set(Purpose))  # an alias would give two purposes one stream


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64)])
def test_numbers_out_of_range_are_errors(seed: int, index: int) -> None:
    with pytest.raises(OverflowError):
        stream(seed, Purpose.LABELS, index)


@given(seed=NEAR, count=integers(2, 20), first=integers(0, 2**62))
def test_choices_of_neighbours_are_even_and_independent(seed: int, count: int, first: int) -> None:
    size = 4000
    found = choices(seed, Purpose.VIEWS, np.arange(first, first + size), count)
    assert ((found >= 0) & (found < count)).all()
    expected, deviation = size / count, np.sqrt(size / count * (1 - 1 / count))
    assert np.abs(np.bincount(found, minlength=count) - expected).max() < 6 * deviation
    repeats = (found[1:] == found[:-1]).sum()
    assert abs(repeats - expected) < 6 * deviation


@given(seed=NEAR, other=NEAR, start=integers(0, 2**61), stride=sampled_from([1, 2, 1000, 2**32]))
def test_choices_depend_on_each_index_alone_and_on_seed_and_purpose(
    seed: int, other: int, start: int, stride: int
) -> None:
    indices = start + stride * np.arange(200)
    found = choices(seed, Purpose.VIEWS, indices, 2**31)
    assert len(np.unique(found)) == 200
    assert np.array_equal(choices(seed, Purpose.VIEWS, indices[::-1], 2**31), found[::-1])
    assert choices(seed, Purpose.VIEWS, indices[7:8], 2**31) == found[7]
    assert (choices(seed, Purpose.CROPS, indices, 2**31) != found).all()
    if other != seed:
        assert (choices(other, Purpose.VIEWS, indices, 2**31) != found).all()


def test_torch_seeds_of_steps_and_ranks_differ_also_in_the_bits_that_the_cpu_uses() -> None:
    seeds = {
        torch_seed(seed, Purpose.TRAINING_STEP, step, rank) % 2**32
        for seed, step, rank in itertools.product((0, 1), range(250), range(4))
    }
    assert len(seeds) == 2000


def test_seeding_torch_fixes_what_its_generator_draws() -> None:
    draws = []
    for index, part in ((0, 0), (1, 0), (0, 1), (0, 0)):
        seed_torch(3, Purpose.TRAINING_STEP, index, part)
        draws.append(torch.rand(8))
    assert torch.equal(draws[0], draws[3])
    assert not any(torch.equal(first, second) for first, second in itertools.combinations(draws[:3], 2))
