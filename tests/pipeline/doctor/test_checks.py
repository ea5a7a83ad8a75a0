"""Checks of everything but CUDA."""

from __future__ import annotations

import fcntl
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from conf.load import load_settings, names
from conf.runtime import RuntimeConfig
from pipeline.budget.images import IMAGENET
from pipeline.budget.shape import shape_of
from pipeline.doctor import checks, cpu, home, network, presets, software
from pipeline.doctor.devices import Device, TorchFacts
from pipeline.doctor.finding import Finding, worst

GB = 1_000_000_000
CARD = Device(
    name="card",
    memory=24 * GB,
    free=24 * GB,
    capability="8.9",
    bfloat16=True,
    compiled=True,
    attention="xformers",
    refusal="",
)


def test_a_cpu_that_emulates_bfloat16() -> None:
    slow = TorchFacts(version="2", rates={"float32": 100e9, "bfloat16": 5e9})
    fast = TorchFacts(version="2", rates={"float32": 100e9, "bfloat16": 150e9})
    found = cpu.check_bfloat16(slow, [])
    assert (found.level, "float32" in found.advice) == ("warning", True)
    assert cpu.check_bfloat16(fast, ["avx512f"]).level == "ok"
    with_gpu = TorchFacts(version="2", rates=slow.rates, devices=(CARD,))
    assert cpu.check_bfloat16(with_gpu, []).level == "ok", "models do not run there"


@pytest.mark.parametrize(("processes", "level"), [(4, "ok"), (5, "warning")])
def test_more_processes_than_cores(processes: int, level: str) -> None:
    found = cpu.check_cores(4, 8, RuntimeConfig(processes=processes))
    assert found.level == level
    assert "4 of 8 cores" in found.found


def test_memory_and_shared_memory() -> None:
    assert cpu.check_memory(8 * GB, 7 * GB).level == "ok"
    assert cpu.check_memory(2 * GB, 7 * GB) == Finding(
        "memory", "warning", "2.0 GB, 2.0 GB available", "the demo needs 4 GB: lower batch sizes"
    )
    two = TorchFacts(version="2", devices=(CARD, CARD))
    assert [cpu.check_shared_memory(64_000_000, facts).level for facts in (TorchFacts(), two)] == ["ok", "warning"]
    assert cpu.check_shared_memory(8 * GB, two).level == "ok"
    assert cpu.check_shared_memory(None, two).level == "warning"


def test_a_compiler_is_needed_only_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    without, with_gpu = TorchFacts(version="2"), TorchFacts(version="2", devices=(CARD,))
    assert cpu.check_compiler(RuntimeConfig(), without, {}).level == "ok"
    assert cpu.check_compiler(RuntimeConfig(), with_gpu, {}).level == "warning", "steps are compiled by default"
    assert cpu.check_compiler(RuntimeConfig(compile=False), with_gpu, {}).level == "ok"
    assert cpu.check_compiler(RuntimeConfig(compile=True), without, {}).level == "blocker"
    (tmp_path / "g++").touch(mode=0o755)
    assert cpu.check_compiler(RuntimeConfig(compile=True), without, {}).found == str(tmp_path / "g++")


def test_torch_that_cannot_be_imported() -> None:
    (found,) = cpu.check_torch(TorchFacts(error="ImportError: libcudart"))
    assert (found.level, found.found) == ("blocker", "ImportError: libcudart")
    assert list(cpu.check_torch(TorchFacts(version="2.10.0"))) == []
    assert cpu.check_bfloat16(TorchFacts(), []).level == "warning"


def test_a_home_that_need_not_exist_yet(tmp_path: Path) -> None:
    found = {finding.check: finding.level for finding in home.check_home(tmp_path / "not" / "there")}
    assert found == {"home": "ok", "locks": "ok", "clock": "ok", "file system": "ok"}
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(home.tempfile, "NamedTemporaryFile", refuse)
    (found,) = home.check_home(tmp_path)
    assert (found.level, "Permission denied" in found.found) == ("blocker", True)


def test_locks_that_keep_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch()
    monkeypatch.setattr(home, "flock", lambda file, how: None)
    assert home.check_locks(path).level == "blocker"

    def no_locks(file: object, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(home, "flock", no_locks)
    assert "No locks available" in home.check_locks(path).found
    monkeypatch.setattr(home, "flock", fcntl.flock)
    assert home.check_locks(path).level == "ok"


@pytest.mark.parametrize(("skew_s", "level"), [(0.5, "ok"), (-30.0, "warning"), (30.0, "warning")])
def test_a_clock_of_another_machine(skew_s: float, level: str) -> None:
    assert home.check_clock(skew_s).level == level


def test_little_disk_and_a_network_file_system(tmp_path: Path) -> None:
    assert [home.check_disk(tmp_path, free).level for free in (GB, 50 * GB)] == ["warning", "ok"]
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\ntmpfs /other tmpfs rw 0 0\n")
    assert home.file_system(tmp_path / "home", mounts) == "nfs4"
    assert home.file_system(Path("/srv"), mounts) == "ext4"
    assert [home.check_file_system(kind).level for kind in ("nfs4", "ext4")] == ["warning", "ok"]


def test_a_host_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> None:
        raise OSError("unknown")

    several = RuntimeConfig(nodes=2)
    found = network.check_host_name("box", several, unknown)
    assert (found.level, found.advice) == ("warning", "add box with its address to /etc/hosts")
    assert network.check_host_name("box", RuntimeConfig(), unknown).level == "ok", "one machine does not need it"
    assert network.check_host_name("box", several, lambda name: "127.0.0.1").level == "ok"
    monkeypatch.setattr(network, "_PATIENCE_S", 0.05)
    late = network.check_host_name("box", several, lambda name: time.sleep(0.5))
    assert late.level == "warning", "it takes too long"


def test_commands_of_slurm() -> None:
    slurm = RuntimeConfig(launcher="slurm")
    assert list(network.check_slurm(RuntimeConfig(), lambda name: None)) == []
    (found,) = network.check_slurm(slurm, lambda name: None if name == "sbatch" else name)
    assert (found.level, found.found) == ("blocker", "no command sbatch")
    (found,) = network.check_slurm(slurm, lambda name: name)
    assert found.level == "ok"


@pytest.mark.parametrize(
    ("variables", "level"),
    [
        ({}, "ok"),
        ({"http_proxy": "http://proxy:1"}, "warning"),
        ({"http_proxy": "http://proxy:1", "no_proxy": "localhost"}, "warning"),
        ({"http_proxy": "http://proxy:1", "no_proxy": "127.0.0.1,localhost"}, "ok"),
        ({"all_proxy": "http://proxy:1"}, "warning"),
        ({"https_proxy": "http://proxy:1"}, "ok"),
    ],
)
def test_a_proxy_that_catches_our_own_servers(
    variables: dict[str, str], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert network.check_proxies().level == level


def test_ports_in_use(tmp_path: Path) -> None:
    runtime = RuntimeConfig(home=tmp_path, prefect_port=4300)

    def owner(port: int) -> str | None:
        return "python (pid 1)" if port == 4300 else None

    other = {found.check: found for found in network.check_ports(runtime, owner)}
    assert (other["port 4300"].level, other["port 5000"].level) == ("warning", "ok")
    assert other["port 4300"].advice == "for `dpar up`, set DPAR_PREFECT_PORT=4400"
    assert {found.level for found in network.check_ports(runtime, owner, ours=True)} == {"ok"}


def test_versions_outside_the_requirements() -> None:
    def installed(name: str) -> str:
        if name == "mlflow":
            raise PackageNotFoundError(name)
        return {"torch": "2.14.1+cu130", "prefect": "3.8.8"}[name]

    required = ["torch<2.11,>=2.10", "prefect>=3.8", "mlflow>=3", "win; sys_platform == 'win32'", "x; extra == 'dev'"]
    found = {finding.check: finding for finding in software.check_packages(required, installed)}
    assert {name: finding.level for name, finding in found.items()} == {
        "torch": "warning",
        "mlflow": "blocker",
        "packages": "ok",
    }
    assert found["torch"].found == "2.14.1+cu130, expected <2.11,>=2.10"
    assert [software.check_python(version).level for version in ((3, 10, 4), (3, 12, 0))] == ["blocker", "ok"]


def test_every_preset_is_compared_with_the_memory_there_is() -> None:
    small = {found.check: found for found in presets.check_presets(TorchFacts(), 4 * GB, 1)}
    assert set(small) == {f"preset {name}" for name in names("preset")}
    assert small["preset tiny"].level == "ok"
    assert small["preset imagenet256-xl"].level == "warning"
    on_card = {found.check: found for found in presets.check_presets(TorchFacts(devices=(CARD,)), 512 * GB, 1)}
    assert on_card["preset imagenet256-b"].level == "ok"
    assert "on a device" in on_card["preset imagenet256-b"].found
    tight = {found.check: found for found in presets.check_presets(TorchFacts(devices=(CARD,)), 1 * GB, 1)}
    assert "the host has 1.0 GB" in tight["preset tiny"].found


def test_the_least_memory_leaves_out_stages_that_do_not_run() -> None:
    with_entropies, _ = load_settings("imagenet256-b", None, ["entropy_model.model=XL"])
    without, _ = load_settings("imagenet256-b", "llamagen", ["entropy_model.model=XL", "tokenize.batch_size=1"])
    shape = shape_of(without, *IMAGENET, "test")
    assert presets.least_device_memory(with_entropies, shape, 1) > presets.least_device_memory(without, shape, 1)


def test_all_checks_together_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = TorchFacts(version="2.10.0", cuda="12.8", rates={"float32": 1e11, "bfloat16": 1e11})
    monkeypatch.setattr(checks, "torch_facts", lambda: facts)
    found = checks.examine(RuntimeConfig(home=tmp_path))
    assert {"python", "packages", "cores", "memory", "home", "locks", "host name", "cuda"} <= {
        each.check for each in found
    }
    assert worst([Finding("a", "ok", ""), Finding("b", "blocker", ""), Finding("c", "warning", "")]) == "blocker"
    assert worst([]) == "ok"
