"""Copies beside a device's work: the next task is started before a result is read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stages.runtime.transfer import Download, one_behind, to_device


def test_an_item_is_given_once_the_next_one_is_made() -> None:
    events = list[str]()

    def started() -> Iterator[int]:
        for number in range(3):
            events.append(f"start {number}")
            yield number

    for number in one_behind(started()):
        events.append(f"read {number}")
    assert events == ["start 0", "start 1", "read 0", "start 2", "read 1", "read 2"]
    assert list(one_behind([])) == []


def test_a_tensor_of_the_cpu_comes_back_as_it_is() -> None:
    values = torch.arange(6).reshape(2, 3)
    assert to_device(values, torch.device("cpu")) is values
    assert Download(values).numpy().tolist() == values.tolist()


def test_copies_to_a_gpu_are_pinned_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, copies = list[torch.Tensor](), list[bool]()
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)

    def recorded(tensor: torch.Tensor, *args: object, non_blocking: bool = False) -> torch.Tensor:
        copies.append(non_blocking)
        return to(tensor, *args, non_blocking=non_blocking)

    monkeypatch.setattr(torch.Tensor, "to", recorded)
    with FakeTensorMode():
        values = torch.zeros(2, 3)
        moved = to_device(values, torch.device("cuda"))
    assert (moved.device.type, moved.shape) == ("cuda", (2, 3))
    assert len(pinned) == 1
    assert copies == [True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_download_waits_for_its_own_copy_only() -> None:
    device = torch.device("cuda")
    values = to_device(torch.arange(2**20), device)
    download = Download(values * 2)
    values.zero_()  # after the copy was queued
    assert download.numpy().tolist() == list(range(0, 2**21, 2))
