"""The stream of samples: exact epochs, the same for any number of processes, a function of the step alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.runtime.distributed import World
from stages.runtime.errors import InputError
from stages.training.stream import SampleStream


def world(rank: int, size: int) -> World:
    return World(rank, size, torch.device("cpu"))


def epoch_images(stream: SampleStream, steps: int, size: int = 1) -> np.ndarray:
    return np.concatenate(
        [stream.rank_slice(step, world(rank, size))[0] for step in range(steps) for rank in range(size)]
    )


def test_an_epoch_is_a_permutation_even_when_the_batch_does_not_divide_it() -> None:
    stream = SampleStream(num_images=103, global_batch_size=8, seed=3)
    images = epoch_images(stream, 103)  # 103 steps of 8 are exactly 8 epochs
    for epoch in range(8):
        assert sorted(images[epoch * 103 : (epoch + 1) * 103]) == list(range(103))
    assert not np.array_equal(images[:103], images[103:206])


def test_the_number_of_processes_changes_nothing() -> None:
    stream = SampleStream(num_images=50, global_batch_size=12, seed=0)
    alone = epoch_images(stream, 20)
    for size in (2, 3, 4):
        assert np.array_equal(epoch_images(stream, 20, size), alone)


def test_seeds_give_other_orders() -> None:
    first, second = (SampleStream(50, 10, seed) for seed in (0, 1))
    assert not np.array_equal(epoch_images(first, 5), epoch_images(second, 5))


def test_a_batch_may_be_larger_than_an_epoch() -> None:
    images, epochs = SampleStream(5, 12, 0).rank_slice(0, world(0, 1))
    assert list(epochs) == [0] * 5 + [1] * 5 + [2] * 2
    assert sorted(images[:5]) == list(range(5))


def test_an_indivisible_batch_is_refused() -> None:
    with pytest.raises(InputError, match="global_batch_size is 10, expected a multiple of the 4 processes"):
        SampleStream(50, 10, 0).rank_slice(0, world(0, 4))


def test_views_are_even_and_change_with_the_epoch() -> None:
    stream = SampleStream(40_000, 8, 7)
    images = np.arange(40_000)
    first = stream.views(images, np.zeros_like(images), 10)
    second = stream.views(images, np.ones_like(images), 10)
    counts = np.bincount(first, minlength=10)
    assert counts.min() > 3700
    assert counts.max() < 4300
    assert 0.07 < (first == second).mean() < 0.13
    assert np.array_equal(first, stream.views(images, np.zeros_like(images), 10))
