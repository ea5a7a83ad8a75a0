"""The stream of samples: exact epochs, the same for any number of processes, a function of the step alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers

from stages.runtime.distributed import World
from stages.runtime.errors import InputError
from stages.training.stream import Part, SampleStream, divided, share_of

SEEDS = integers(0, 2**63 - 1)


def world(rank: int, size: int) -> World:
    return World(rank, size, torch.device("cpu"))


def taken(stream: SampleStream, steps: range, size: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Images and epochs of some steps, in the stream's order, as `size` processes take them."""
    shares = [share_of(stream.global_batch_size, world(rank, size)) for rank in range(size)]
    slices = [stream.samples(step, share) for step in steps for share in shares]
    images, epochs = zip(*slices, strict=True)
    return np.concatenate(images), np.concatenate(epochs)


@given(num_images=integers(1, 60), batch=integers(1, 90), seed=SEEDS)
def test_an_epoch_is_a_permutation_wherever_batches_cut_it(num_images: int, batch: int, seed: int) -> None:
    stream = SampleStream(num_images, batch, seed)
    images, epochs = taken(stream, range(-(-3 * num_images // batch)))
    for epoch in range(3):
        part = slice(epoch * num_images, (epoch + 1) * num_images)
        assert sorted(images[part]) == list(range(num_images))
        assert (epochs[part] == epoch).all()


@pytest.mark.slow
@given(num_images=integers(1, 60), share=integers(1, 12), size=integers(2, 6), first=integers(0, 200), seed=SEEDS)
def test_the_number_of_processes_changes_nothing(num_images: int, share: int, size: int, first: int, seed: int) -> None:
    stream, steps = SampleStream(num_images, share * size, seed), range(first, first + 4)
    for alone, shared in zip(taken(stream, steps), taken(stream, steps, size), strict=True):
        assert np.array_equal(alone, shared)


@pytest.mark.slow
@given(num_images=integers(1, 60), batch=integers(1, 40), first=integers(0, 300), seed=SEEDS)
def test_a_step_is_the_same_whatever_was_taken_before(num_images: int, batch: int, first: int, seed: int) -> None:
    stream = SampleStream(num_images, batch, seed)
    together = taken(stream, range(first, first + 4))
    for step in (3, 0, 2, 1):
        alone = taken(stream, range(first + step, first + step + 1))
        for one, all_four in zip(alone, together, strict=True):
            assert np.array_equal(all_four[step * batch : (step + 1) * batch], one)


@given(seed=SEEDS, other=SEEDS)
def test_epochs_and_seeds_have_orders_of_their_own(seed: int, other: int) -> None:
    images, _ = taken(SampleStream(60, 60, seed), range(2))
    assert not np.array_equal(images[:60], images[60:])
    if other != seed:
        assert not np.array_equal(taken(SampleStream(60, 60, other), range(1))[0], images[:60])


def test_a_batch_may_be_larger_than_an_epoch() -> None:
    images, epochs = SampleStream(5, 12, 0).samples(0, Part(0, 12))
    assert list(epochs) == [0] * 5 + [1] * 5 + [2] * 2
    assert sorted(images[:5]) == list(range(5))


def test_an_indivisible_batch_is_refused() -> None:
    with pytest.raises(InputError, match="global_batch_size is 10, expected a multiple of the 4 processes"):
        share_of(10, world(0, 4))


@given(count=integers(1, 40), size=integers(1, 4), micro_batch=integers(1, 50), seed=SEEDS)
def test_micro_batches_hold_the_images_of_their_share_in_order(
    count: int, size: int, micro_batch: int, seed: int
) -> None:
    stream = SampleStream(30, count * size, seed)
    for rank in range(size):
        share = share_of(count * size, world(rank, size))
        parts = divided(share, micro_batch)
        assert all(part.count == micro_batch for part in parts[:-1])
        assert 0 < parts[-1].count <= micro_batch
        for whole, pieces in zip(
            stream.samples(3, share), zip(*(stream.samples(3, part) for part in parts), strict=True), strict=True
        ):
            assert np.array_equal(np.concatenate(pieces), whole)


@given(seed=SEEDS, epoch=integers(0, 10**6))
def test_views_are_even_and_independent_of_the_last_epochs(seed: int, epoch: int) -> None:
    stream, images = SampleStream(20_000, 8, seed), np.arange(20_000)
    first, second = (stream.views(images, np.full_like(images, epoch + more), 10) for more in (0, 1))
    # Counts are binomial with a deviation of 42; six of them are exceeded once in 500 million.
    assert np.abs(np.bincount(first, minlength=10) - 2000).max() < 6 * 42.5
    assert abs((first == second).sum() - 2000) < 6 * 42.5
    assert np.array_equal(stream.views(images[::-1], np.full_like(images, epoch), 10), first[::-1])
