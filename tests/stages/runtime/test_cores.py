"""Cores that a process may use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stages.runtime import cores
from stages.runtime.cores import available_cores


def test_cores_are_those_of_the_affinity_shared_among_local_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cores, "_quotas", lambda groups: iter([]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    assert available_cores() == 6
    for processes, share in (("2", 3), ("4", 1), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert available_cores() == share
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    assert available_cores() == 4


def test_a_container_with_a_quota_gives_its_processes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(cores, "_quotas", lambda groups: iter([8.5]))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert available_cores() == 4


@pytest.mark.parametrize("module", ["stages.dataset", "stages.sampling.export"])
def test_work_in_threads_alone_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
