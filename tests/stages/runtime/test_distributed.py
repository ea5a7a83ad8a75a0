"""What a process may use of its machine."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from conf.runtime import RuntimeConfig
from stages.runtime.distributed import World, data_parallel, own_gradients, process_group, start_max
from stages.runtime.errors import InputError


def test_a_process_uses_its_share_unless_the_settings_say_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 9})
    try:
        for threads, wanted in ((0, 3), (2, 2)):
            with process_group(RuntimeConfig(device="cpu", threads=threads)):
                assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)


def test_more_processes_than_devices_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    message = r"4 processes on a machine with 2 CUDA devices, expected at most one for each device: set runtime.proc"
    with pytest.raises(InputError, match=message), process_group(RuntimeConfig(device="cuda")):
        pass


def test_alone_nothing_is_wrapped_and_its_own_numbers_are_the_largest() -> None:
    module = nn.Linear(2, 2)
    assert data_parallel(module, World(0, 1, torch.device("cpu"))) is module
    with own_gradients(module):
        module(torch.ones(1, 2)).sum().backward()
    assert module.weight.grad is not None
    assert start_max([3, -4])() == [3, -4]
