"""The scheduler with a made-up model: every image takes its steps in order, batches are full, and nobody starves."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.clocks import DONE, Clocks

TOKEN, GLOBAL = range(2)


class Walk:
    """Steps that only count. `opens` says where an image needs a global step before its token (N, T)."""

    kinds = 2

    def __init__(self, opens: Tensor, slots: int) -> None:
        self._opens = torch.nn.functional.pad(opens, (0, 1, 0, 1))  # a position after the last, an image after the last
        self._position = torch.zeros(slots + 1, dtype=torch.int64, device=opens.device)

    def step(self, kind: int, slots: Tensor, images: Tensor) -> Tensor:
        if kind == GLOBAL:
            return torch.full_like(slots, TOKEN)
        after = self._position[slots] + 1
        done = after == self._opens.shape[1] - 1
        self._position[slots] = torch.where(done, 0, after)
        return torch.where(done, DONE, torch.where(self._opens[images, after], GLOBAL, TOKEN))


class Journey:
    """All ticks of some images: kind and images of each."""

    def __init__(self, opens: Tensor, slots: int, batch: int) -> None:
        steps, clocks = Walk(opens, slots), Clocks(len(opens), slots, batch, 2, opens.device)
        self.ticks: list[tuple[int, list[int]]] = []
        self.finished: list[int] = []
        while (kind := clocks.fullest(clocks.waiting.tolist())) is not None:
            rows = clocks.take(kind)
            images = clocks.images[rows]
            self.ticks.append((kind, images.tolist()))
            self.finished += images[clocks.put(rows, steps.step(kind, rows, images))].tolist()
        self.usage = clocks.usage

    def fill(self, kind: int, batch: int) -> float:
        """Share of the rows of a kind of steps that had an image."""
        rows = [len(images) for found, images in self.ticks if found == kind]
        return sum(rows) / (batch * len(rows))


def starts(images: int, tokens: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(images, tokens, generator=torch.Generator().manual_seed(seed)) < share


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 12),
    tokens=st.integers(1, 9),
    slots=st.integers(1, 14),
    batch=st.integers(1, 8),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_every_image_takes_exactly_its_steps_in_their_order(
    images: int, tokens: int, slots: int, batch: int, share: float, seed: int
) -> None:
    opens = starts(images, tokens, share, seed)
    journey = Journey(opens, min(slots, images), batch)
    taken: list[list[int]] = [[] for _ in range(images)]
    for kind, together in journey.ticks:
        assert 0 < len(together) <= batch
        assert len(set(together)) == len(together)
        for image in together:
            taken[image].append(kind)
    for image in range(images):
        expected = [GLOBAL, TOKEN]
        for opened in opens[image, 1:].tolist():
            expected += [GLOBAL, TOKEN] if opened else [TOKEN]
        assert taken[image] == expected
    assert sorted(journey.finished) == list(range(images))


@pytest.mark.parametrize(("slots", "batch"), [(8, 4), (32, 16), (128, 64)])
def test_with_twice_as_many_slots_nearly_all_batches_are_full(slots: int, batch: int) -> None:
    journey = Journey(starts(16 * batch, 256, 1 / 1.81), slots, batch)
    assert journey.fill(TOKEN, batch) > 0.97
    assert journey.fill(GLOBAL, batch) > 0.97


def test_in_flight_only_as_often_as_a_batch_has_rows_batches_are_half_empty() -> None:
    journey = Journey(starts(256, 256, 1 / 1.81), 16, 16)
    assert journey.fill(GLOBAL, 16) < 0.8, "what twice as many slots are for"


def test_the_use_of_batches_and_their_tail_are_counted() -> None:
    journey, batch = Journey(starts(40, 64, 0.5), 16, 8), 8
    rows = [len(images) for _, images in journey.ticks]
    assert journey.usage.ticks == len(rows)
    assert journey.usage.filled == pytest.approx(sum(rows) / (batch * len(rows)))
    last = {image: tick for tick, (_, images) in enumerate(journey.ticks) for image in images}
    fewer = sorted(last.values())[40 - 16]  # the tick in which the first of the last 16 images is finished
    assert journey.usage.tail == len(rows) - 1 - fewer


def test_no_image_starves() -> None:
    """Images that open a patch at every token, among others that never do, and the other way round."""
    slots, batch = 16, 8
    for share in (0.1, 0.9):
        opens = torch.zeros(128, 64, dtype=torch.bool)
        opens[starts(128, 1, share)[:, 0]] = True
        waited: dict[int, int] = {}
        for tick, (_, together) in enumerate(Journey(opens, slots, batch).ticks):
            for image in together:
                assert tick - waited.get(image, tick) <= 64 + 2 * (slots // batch)
                waited[image] = tick


def test_images_enter_in_their_order() -> None:
    seen: list[int] = []
    for _, together in Journey(starts(40, 16, 0.5), 8, 4).ticks:
        seen += [image for image in together if image not in seen]
    assert seen == list(range(40))


def test_a_tick_on_a_gpu_waits_for_nothing_and_has_full_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as waits:
        opens = torch.zeros(5, 9, dtype=torch.bool, device=CUDA)
        steps, clocks = Walk(opens, 4), Clocks(5, 4, 3, 2, CUDA)
        for kind in (GLOBAL, TOKEN, GLOBAL, TOKEN):
            rows = clocks.take(kind)
            assert rows.shape == (3,)
            clocks.put(rows, steps.step(kind, rows, clocks.images[rows]))
        assert clocks.waiting.device == CUDA
    assert not waits.found
