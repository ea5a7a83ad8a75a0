"""Checkpoints and the log after damage: none is loaded that was not written so, and the run resumes from the rest."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conf.section import TrainingConfig
from stages.training import checkpoint
from stages.training.checkpoint import load_latest, save_checkpoint
from stages.training.log import MetricLog
from stages.training.state import TrainingState

CPU = torch.device("cpu")
FLIPS = 60


def real_state(step: int) -> dict[str, Any]:
    """Weights, optimiser and average of a small model after a step."""
    torch.manual_seed(step)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.LayerNorm(16))
    state = TrainingState(model, {}, TrainingConfig(steps=10, ema_decay=0.9, learning_rate=0.1))
    model(torch.arange(50)).square().mean().backward()
    state.step(0.1)
    return state.state_dict() | {"step": step, "data": {"seed": 5, "tokens": "t" * 64}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for step in (100, 200):
        save_checkpoint(folder, step, real_state(step))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """The folder of a run with checkpoints of steps 100 and 200."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def loaded_step(folder: Path) -> int | None:
    state = load_latest(folder, CPU)
    return None if state is None else state["step"]


def test_a_checkpoint_comes_back_as_it_was_saved(folder: Path) -> None:
    state, wanted = load_latest(folder, CPU), real_state(200)
    assert state is not None
    assert state["step"] == 200
    assert state["data"] == wanted["data"]
    for name, weight in wanted["model"]["weights"].items():
        assert torch.equal(state["model"]["weights"][name], weight)


def test_the_digest_is_that_of_the_file_and_sha256sum_reads_it(folder: Path) -> None:
    data = (folder / "step-000000200.pt").read_bytes()
    said = (folder / "step-000000200.sha256").read_text()
    assert said == f"{hashlib.sha256(data).hexdigest()}  step-000000200.pt\n"


@pytest.mark.parametrize("name", ["step-000000200.pt", "step-000000200.sha256"])
def test_no_flipped_bit_is_loaded(folder: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    whole = (folder / name).read_bytes()
    bits = [8 * len(whole) * number // FLIPS + number % 8 for number in range(FLIPS)]
    found = []
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(damaged)
        found.append(loaded_step(folder))
    assert found == [100] * FLIPS
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == FLIPS
    assert all("step-000000200.pt is damaged: step-000000200.sha256 is not its digest" in text for text in warnings)
    (folder / name).write_bytes(whole)
    assert loaded_step(folder) == 200


@pytest.mark.parametrize("name", ["step-000000200.pt", "step-000000200.sha256"])
@pytest.mark.parametrize("length", [0, 10, -1])
def test_a_cut_checkpoint_or_digest_is_not_loaded(folder: Path, name: str, length: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:length])
    assert loaded_step(folder) == 100


def test_a_checkpoint_without_a_digest_is_named_and_the_one_before_taken(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "step-000000200.sha256").unlink()
    assert loaded_step(folder) == 100
    assert "step-000000200.pt has no digest beside it" in caplog.text
    (folder / "step-000000100.sha256").unlink()
    assert loaded_step(folder) is None


def test_a_digest_of_another_checkpoint_is_none_of_this_one(folder: Path) -> None:
    shutil.copy(folder / "step-000000100.pt", folder / "step-000000200.pt")
    assert loaded_step(folder) == 100
    shutil.copy(folder / "step-000000100.sha256", folder / "step-000000200.sha256")
    assert loaded_step(folder) == 100


@pytest.mark.parametrize("writes", [0, 1])
def test_a_kill_before_or_between_the_two_writes_resumes_from_the_checkpoint_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    done: list[Path] = []
    original = checkpoint.write_atomic

    def dies(path: Path, write: Any) -> None:
        if len(done) == writes:
            raise KeyboardInterrupt
        original(path, write)
        done.append(path)

    monkeypatch.setattr(checkpoint, "write_atomic", dies)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, 300, real_state(300))
    assert (folder / "step-000000300.pt").exists() == bool(writes)
    assert loaded_step(folder) == 200
    monkeypatch.undo()
    save_checkpoint(folder, 300, real_state(300))
    assert loaded_step(folder) == 300


@pytest.mark.parametrize(("keep", "steps"), [(1, [300]), (2, [200, 300])])
def test_old_checkpoints_go_with_their_digests(folder: Path, keep: int, steps: list[int]) -> None:
    (folder / "step-000000050.sha256").write_text("left by a kill while its checkpoint was removed")
    (folder / "notes.txt").write_text("not ours")
    save_checkpoint(folder, 300, {"step": 300}, keep=keep)
    wanted = [f"step-{step:09d}.{suffix}" for step in steps for suffix in ("pt", "sha256")]
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", *wanted]


def test_an_error_that_is_no_damage_is_not_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        load_latest(folder, CPU)


def steps_logged(log: MetricLog) -> list[int]:
    return [json.loads(line)["step"] for line in log.path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> MetricLog:
    log = MetricLog(tmp_path, 0, enabled=True)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
    return log


def test_the_log_cuts_what_a_resumed_run_makes_again(
    log: MetricLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed here
    MetricLog(tmp_path, 2, enabled=True)
    assert steps_logged(log) == [1, 2]
    assert caplog.text == ""


DAMAGED = [
    b'{"step": 2, "loss": 1.0',
    b"",
    b"\x00\xff",
    b"[2]",
    b"2",
    b'{"loss": 1.0}',
    b'{"step": "2"}',
    b'{"step": null}',
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_dropped_and_the_others_stay(
    log: MetricLog, tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    lines = log.path.read_bytes().split(b"\n")
    log.path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    MetricLog(tmp_path, 9, enabled=True)
    assert steps_logged(log) == [1, 3]
    assert log.path.read_bytes().split(b"\n") == [lines[0], *lines[2:]]
    assert f"{log.path} is damaged, lines dropped: 1" in caplog.text


def test_no_flipped_bit_in_the_log_stops_a_run(log: MetricLog, tmp_path: Path) -> None:
    whole = log.path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        log.path.write_bytes(damaged)
        MetricLog(tmp_path, 10**6, enabled=True)
        assert 1 <= len(steps_logged(log)) <= 3
