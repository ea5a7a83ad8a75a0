"""`dpar doctor`: table, JSON and exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cli.main import run_command
from pipeline.doctor import checks, devices
from pipeline.doctor.devices import Device, TorchFacts
from pipeline.doctor.finding import Finding

FINDINGS = [Finding("cores", "ok", "2 cores"), Finding("clock", "warning", "off by 9 s", "synchronise the clocks")]
BLOCKER = Finding("locks", "blocker", "flock does not work", "set DPAR_HOME")


@pytest.mark.parametrize(("more", "code", "summary"), [([], 0, "0 blockers"), ([BLOCKER], 1, "1 blocker")])
def test_a_blocker_is_exit_code_1(
    more: list[Finding],
    code: int,
    summary: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(checks, "examine", lambda runtime: FINDINGS + more)
    assert run_command(["doctor"]) == code
    out = capsys.readouterr().out
    assert "-> synchronise the clocks" in out
    assert out.splitlines()[-1] == f"1 ok, 1 warning, {summary}"
    assert run_command(["doctor", "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["worst"] == ("blocker" if more else "warning")
    assert told["findings"][1] == {
        "check": "clock",
        "level": "warning",
        "found": "off by 9 s",
        "advice": "synchronise the clocks",
    }


@pytest.mark.slow
def test_the_real_checks_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_command(["doctor", "--json", "--set", f"runtime.home={tmp_path}"])
    told = json.loads(capsys.readouterr().out)
    levels = {finding["check"]: finding["level"] for finding in told["findings"]}
    assert (code == 1) == ("blocker" in levels.values())
    assert "torch" not in levels, "torch was imported in the child"
    assert {"bfloat16 on the CPU", "cuda", "preset demo", "locks"} <= levels.keys()


def test_a_child_that_dies_is_a_fact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'ImportError: libcudart.so.12' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(devices.sys, "executable", str(script))
    assert devices.torch_facts() == TorchFacts(error="ImportError: libcudart.so.12")


def test_facts_survive_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = Device(
        name="card", memory=2, free=1, capability="9.0", bfloat16=True, compiled=True, attention="varlen", refusal="no"
    )
    facts = TorchFacts(version="2.10.0", cuda="12.8", devices=(card,), rates={"float32": 1.0})
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\ncat {tmp_path / 'facts.json'}\n")
    script.chmod(0o755)
    (tmp_path / "facts.json").write_text(json.dumps(devices.asdict(facts)))
    monkeypatch.setattr(devices.sys, "executable", str(script))
    assert devices.torch_facts() == facts
