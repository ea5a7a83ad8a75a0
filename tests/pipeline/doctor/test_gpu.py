"""Findings on CUDA from made-up facts: no test needs a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from conf.runtime import RuntimeConfig
from pipeline.doctor.devices import Device, TorchFacts, _has_kernels
from pipeline.doctor.finding import Finding
from pipeline.doctor.gpu import check_cuda, driver_version

H100 = Device(
    name="NVIDIA H100 80GB HBM3",
    memory=85_000_000_000,
    free=84_000_000_000,
    capability="9.0",
    bfloat16=True,
    compiled=True,
    attention="xformers",
    refusal="",
)
WITH_GPU = TorchFacts(version="2.10.0", cuda="12.8", devices=(H100,))
WITHOUT = TorchFacts(version="2.10.0", cuda="12.8", error="Found no NVIDIA driver on your system.")


def cuda(
    facts: TorchFacts, *, device: str = "auto", processes: int = 1, driver: str | None = "570.86", shown: bool = True
) -> dict[str, Finding]:
    runtime = RuntimeConfig(device=device, processes=processes)
    return {found.check: found for found in check_cuda(facts, runtime, driver, has_device=shown)}


def test_a_device_on_which_everything_works() -> None:
    found = cuda(WITH_GPU)
    assert {finding.level for finding in found.values()} == {"ok"}
    assert found["cuda"].found == "CUDA 12.8, driver 570.86, 1 device"
    assert found["cuda:0"].found == "NVIDIA H100 80GB HBM3, sm 9.0, 85.0 GB, 84.0 GB free, bfloat16"
    assert found["cuda:0 attention"].found == "xformers"


@pytest.mark.parametrize(
    ("change", "check", "level", "words"),
    [
        ({"bfloat16": False, "capability": "7.5"}, "cuda:0", "warning", "no bfloat16 in hardware"),
        ({"compiled": False}, "cuda:0", "blocker", "no kernels"),
        ({"free": 1_000_000_000}, "cuda:0", "warning", "1.0 GB free"),
        ({"attention": "padded", "refusal": "why not"}, "cuda:0 attention", "warning", "padded: why not"),
        ({"attention": "varlen", "refusal": "why not"}, "cuda:0 attention", "ok", "varlen: why not"),
    ],
)
def test_what_a_device_lacks(change: dict[str, object], check: str, level: str, words: str) -> None:
    found = cuda(replace(WITH_GPU, devices=(replace(H100, **change),)))[check]  # type: ignore[arg-type]
    assert found.level == level
    assert words in found.found
    assert bool(found.advice) == (level != "ok")


@pytest.mark.parametrize(("processes", "level"), [(1, "warning"), (2, None), (3, "blocker")])
def test_a_process_for_each_device(processes: int, level: str | None) -> None:
    found = cuda(replace(WITH_GPU, devices=(H100, H100)), processes=processes).get("processes")
    assert (found.level if found else None) == level


def test_devices_of_a_login_node_do_not_bound_the_processes_of_the_nodes() -> None:
    runtime = RuntimeConfig(launcher="slurm", processes=8)
    assert "processes" not in {found.check for found in check_cuda(WITH_GPU, runtime, "570.86", has_device=True)}


def test_a_gpu_that_the_settings_leave_idle() -> None:
    assert cuda(WITH_GPU, device="cpu")["device"].level == "warning"


@pytest.mark.parametrize(
    ("facts", "driver", "shown", "words"),
    [
        (replace(WITHOUT, cuda=None), "570.86", True, "built without CUDA"),
        (WITHOUT, "510.1", True, "driver 510.1 is too old for CUDA 12.8"),
        (WITHOUT, "570.86", True, "there is a device, and Found no NVIDIA driver"),
    ],
)
@pytest.mark.parametrize(("device", "level"), [("auto", "warning"), ("cuda", "blocker")])
def test_a_device_that_torch_cannot_use(
    facts: TorchFacts, driver: str | None, shown: bool, words: str, device: str, level: str
) -> None:
    found = cuda(facts, device=device, driver=driver, shown=shown)["cuda"]
    assert found.level == level
    assert words in found.found


@pytest.mark.parametrize(("device", "level"), [("auto", "ok"), ("cuda", "blocker")])
def test_a_machine_without_a_device(device: str, level: str) -> None:
    assert cuda(WITHOUT, device=device, driver=None, shown=False)["cuda"].level == level


def test_the_driver_says_its_version(tmp_path: Path) -> None:
    path = tmp_path / "version"
    assert driver_version(path) is None
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 24 22:57:25 UTC 2024\n")
    assert driver_version(path) == "535.161.08"
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n")
    assert driver_version(path) == "570.86.15"


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), True), ((6, 1), False)],
)
def test_kernels_run_on_later_minor_versions_and_compile_for_later_devices(
    capability: tuple[int, int], runs: bool
) -> None:
    assert _has_kernels(capability, ["sm_80", "sm_90a", "compute_90"]) == runs
    assert _has_kernels((12, 0), ["sm_90", "sm_120a"])
