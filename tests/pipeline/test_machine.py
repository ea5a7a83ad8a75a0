"""Cores, memory and instructions of this machine, on made-up files of the kernel."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from pipeline import machine
from stages.runtime import cores


def groups(root: Path, own: str) -> list[Path]:
    (root / "own").write_text(own)
    return cores.control_groups(root, root / "own")


def test_a_quota_of_any_group_around_the_process_counts(tmp_path: Path) -> None:
    (tmp_path / "jobs" / "one").mkdir(parents=True)
    (tmp_path / "jobs" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "jobs" / "one" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "jobs" / "memory.max").write_text("4096\n")
    (tmp_path / "jobs" / "one" / "memory.max").write_text("max\n")
    found = groups(tmp_path, "0::/jobs/one\n")
    assert found == [tmp_path / "jobs" / "one", tmp_path / "jobs", tmp_path]
    assert list(cores._quotas(found)) == [1.5]
    assert list(machine._memory_limits(found)) == [4096]


def test_version_1_of_control_groups(tmp_path: Path) -> None:
    (tmp_path / "cpu,cpuacct" / "jobs").mkdir(parents=True)
    (tmp_path / "cpu,cpuacct" / "jobs" / "cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu,cpuacct" / "jobs" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu,cpuacct" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu,cpuacct" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    found = groups(tmp_path, "4:cpu,cpuacct:/jobs\n3:memory:/\n1:name=systemd:/\n")
    assert list(cores._quotas(found)) == [2.0]
    assert list(machine._memory_limits(found)) == [9223372036854771712]


def test_a_quota_below_a_core_leaves_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_quotas", lambda groups: iter([0.5]))
    assert cores.available_cores() == 1
    monkeypatch.setattr(cores, "_quotas", lambda groups: iter([]))
    assert cores.available_cores() == len(os.sched_getaffinity(0))


def test_no_limit_leaves_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_memory_limits", lambda groups: iter([1 << 62]))
    assert machine.available_memory() == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("flags", "found"),
    [("fpu avx2", []), ("fpu avx512f avx512_bf16", ["avx512_bf16", "avx512f"]), ("amx_bf16", ["amx_bf16"])],
)
def test_instructions_for_bfloat16(tmp_path: Path, flags: str, found: list[str]) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name : x\nflags\t\t: {flags}\n\nflags : again\n")
    assert machine.bfloat16_flags(tmp_path / "cpuinfo") == found


def test_a_processor_that_lists_no_flags(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("Features : asimd bf16\n")
    assert machine.bfloat16_flags(tmp_path / "cpuinfo") == []
    assert machine.bfloat16_flags(tmp_path / "missing") == []


@pytest.mark.parametrize(("device", "found"), [("nvidia0", True), ("dxg", True), ("nvidiactl", False)])
def test_devices_of_the_driver(tmp_path: Path, device: str, found: bool) -> None:
    (tmp_path / device).touch()
    assert machine.has_nvidia_device(tmp_path) == found
