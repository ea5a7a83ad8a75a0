"""`run_stage`: hits, misses, early cutoff, kills, concurrent runs, damage. Every stage here is a real process."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from pipeline.launch import StageFailed
from pipeline.runner import NullObserver, run_stage
from stages.runtime.errors import InputError

if TYPE_CHECKING:
    from conftest import Tiny

ALL_CACHED = ["cached"] * 3


def wait_for(condition: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def inodes(home: Path) -> dict[str, tuple[int, int]]:
    files = [path for name in ("alpha", "beta", "gamma") for path in (home / name).rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.mark.slow
def test_a_rerun_finds_everything_and_rewrites_nothing(tiny: Tiny) -> None:
    assert tiny.run_all() == ["ran"] * 3
    before = inodes(tiny.home)
    assert tiny.run_all() == ALL_CACHED
    assert inodes(tiny.home) == before
    assert {status.state for status in tiny.plan().values()} == {"cached"}


@pytest.mark.slow
def test_a_setting_reruns_its_stage_and_equal_contents_stop_there(finished: Tiny) -> None:
    # beta clips its value at 2: its contents change for 7, and are the same for 7 and 8.
    assert finished.run_all(beta=7) == ["cached", "ran", "ran"]
    assert finished.run_all(beta=8) == ["cached", "ran", "cached"]
    assert finished.run_all() == ALL_CACHED  # the first artifact is still cached


def test_a_docstring_or_comment_reruns_nothing(finished: Tiny) -> None:
    finished.edit("helper", '"""One more."""', '"""The successor."""  # of a number')
    assert finished.run_all() == ALL_CACHED


@pytest.mark.slow
def test_an_edit_with_the_same_result_reruns_one_stage_only(finished: Tiny) -> None:
    finished.edit("helper", "x + 1", "1 + x")
    assert finished.plan()["alpha"].reason == "code stages.helper:increase was edited"
    assert finished.run_all() == ["ran", "cached", "cached"]


@pytest.mark.slow
def test_an_edit_with_another_result_reruns_what_it_changes(tiny: Tiny) -> None:
    tiny.run_all(beta=9)
    tiny.edit("helper", "x + 1", "x + 2")
    assert tiny.run_all(beta=9) == ["ran", "ran", "ran"]


def test_an_unused_function_reruns_nothing(finished: Tiny) -> None:
    finished.edit("helper", "def increase", "def decrease(x):\n    return x - 1\n\n\ndef increase")
    assert finished.run_all() == ALL_CACHED


@pytest.mark.slow
def test_a_deleted_file_is_made_again_and_later_stages_stay(finished: Tiny) -> None:
    (finished.run("beta").path / "number.json").unlink()
    assert finished.plan()["beta"].reason == "file number.json is missing"
    assert finished.run_all() == ["cached", "ran", "cached"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated file", "damaged manifest", "empty manifest"])
def test_damage_is_a_miss(finished: Tiny, damage: str) -> None:
    path = finished.run("alpha").path
    if damage == "truncated file":
        (path / "number.json").write_text("")
    else:
        (path / "manifest.json").write_text("{" if damage == "damaged manifest" else "")
    assert finished.plan()["alpha"].state != "cached"
    assert finished.run("alpha").state == "ran"
    assert finished.run("alpha").state == "cached"


@pytest.mark.slow
def test_a_forced_run_replaces_and_keeps_the_old_one_in_the_trash(finished: Tiny) -> None:
    first = finished.run("alpha")
    before = (first.path / "number.json").stat().st_ino
    assert finished.run("alpha", force=True).state == "ran"
    assert (first.path / "number.json").stat().st_ino != before
    assert len(list((finished.home / ".trash").iterdir())) == 1


def test_a_forced_run_that_fails_keeps_what_there_was(finished: Tiny) -> None:
    path = finished.run("alpha").path
    (finished.home / "fail-alpha").touch()
    with pytest.raises(StageFailed) as caught:
        finished.run("alpha", force=True)
    assert caught.value.code == 2
    assert caught.value.message == "the test asked for it"
    assert json.loads((path / "number.json").read_text()) == 2
    assert finished.run("alpha").state == "cached"


def test_inputs_must_be_there_and_the_error_says_what_to_run(tiny: Tiny) -> None:
    with pytest.raises(InputError, match=r"beta reads alpha, which is missing \(not made yet\): run it first"):
        tiny.run("beta")
    assert tiny.plan()["gamma"].reason == "waits for beta"


@pytest.mark.slow
def test_sigkill_leaves_no_artifact_frees_the_lock_and_a_rerun_goes_on(tiny: Tiny) -> None:
    gate = tiny.gate("alpha")
    runner = tiny.start("alpha")
    steps = [tiny.home / ".work"]
    wait_for(lambda: list(steps[0].glob("*/record/steps")))
    (steps_file,) = steps[0].glob("*/record/steps")
    child = next(p for p in psutil.Process(runner.pid).children(recursive=True))
    runner.send_signal(signal.SIGKILL)
    runner.communicate()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)  # no orphan writes on
    assert not list((tiny.home / "alpha").glob("*")) if (tiny.home / "alpha").exists() else True
    done_before = steps_file.stat().st_size
    gate.unlink()
    result = tiny.run("alpha")
    assert result.state == "ran"
    assert (result.path / "record/steps").stat().st_size == done_before  # the folder of the killed attempt was reused


@pytest.mark.slow
def test_two_runs_at_once_make_it_once(tiny: Tiny) -> None:
    gate = tiny.gate("alpha")
    first = tiny.start("alpha")
    wait_for(lambda: list((tiny.home / ".work").glob("*/record/steps")))
    second = tiny.start("alpha")
    assert second.stderr is not None
    said = second.stderr.readline()  # the second run waits for the lock
    assert said.startswith(f"stage alpha: process {first.pid} on {socket.gethostname()} is making alpha-")
    assert "waiting for it" in said
    gate.unlink()
    states = {process.communicate()[0].strip() for process in (first, second)}
    assert states == {"ran", "waited"}


@pytest.mark.slow
def test_an_orphan_that_still_writes_keeps_the_lock(tiny: Tiny) -> None:
    gate = tiny.gate("alpha")
    runner = tiny.start("alpha")
    wait_for(lambda: list((tiny.home / ".work").glob("*/record/steps")))
    (work,) = (tiny.home / ".work").iterdir()
    child = next(iter(psutil.Process(runner.pid).children(recursive=True)))
    child.suspend()  # a stopped process cannot react to its parent's death
    runner.send_signal(signal.SIGKILL)
    runner.communicate()
    assert tiny.cache.is_locked(work.name)
    child.resume()
    wait_for(lambda: not tiny.cache.is_locked(work.name))
    gate.unlink()
    assert tiny.run("alpha").state == "ran"


@pytest.mark.slow
def test_ctrl_c_ends_the_children_and_leaves_a_state_that_resumes(tiny: Tiny) -> None:
    gate = tiny.gate("alpha")
    runner = tiny.start("alpha")
    wait_for(lambda: list((tiny.home / ".work").glob("*/record/steps")))
    children = psutil.Process(runner.pid).children(recursive=True)
    os.kill(runner.pid, signal.SIGINT)
    _, errors = runner.communicate()
    assert "KeyboardInterrupt" in errors
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    gate.unlink()
    assert tiny.run("alpha").state == "ran"


def test_a_killed_process_is_reported_as_killed(tiny: Tiny) -> None:
    tiny.edit("alpha", "    x = ", "    import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)\n    x = ")
    with pytest.raises(StageFailed, match=r"ended by SIGKILL, possibly out of memory"):
        tiny.run("alpha")


def test_a_process_that_cannot_start_gives_its_last_line(tiny: Tiny) -> None:
    tiny.edit("alpha", "import json, time", "import json, time, no_such_module")
    with pytest.raises(StageFailed, match=r"last line: ModuleNotFoundError: No module named 'no_such_module'"):
        tiny.run("alpha")


@pytest.mark.slow
def test_the_record_is_no_part_of_the_contents(tiny: Tiny) -> None:
    first = tiny.run("alpha")
    manifest = tiny.cache.lookup(first.key)
    assert manifest is not None
    assert manifest.stage == "alpha"
    assert set(manifest.files) == {"number.json"}
    assert first.metrics == {"x": 2}
    assert tiny.run("alpha", force=True).digest == first.digest


@pytest.mark.slow
def test_observers_hear_start_end_and_failure(tiny: Tiny) -> None:
    heard: list[str] = []

    class Ear(NullObserver):
        def stage_started(self, stage: str, key: str, work: Path) -> None:
            heard.append(f"started {stage}")

        def stage_progress(self, stage: str, progress: dict[str, Any]) -> None:
            heard.append("progress")

        def stage_finished(self, result: Any) -> None:
            # An event is reported only after its effect is on disk.
            assert tiny.cache.lookup(result.key) is not None
            heard.append(f"finished {result.stage} {result.state}")

        def stage_failed(self, stage: str, error: BaseException) -> None:
            heard.append(f"failed {stage}")

    graph, settings, runtime = tiny.module.GRAPH, tiny.settings(), tiny.runtime
    for _ in range(2):
        run_stage(graph["alpha"], settings, runtime, observer=Ear(), project=tiny.project)
    (tiny.home / "fail-beta").touch()
    with pytest.raises(StageFailed):
        run_stage(graph["beta"], settings, runtime, observer=Ear(), project=tiny.project)
    assert heard == ["started alpha", "finished alpha ran", "finished alpha cached", "started beta", "failed beta"]


@pytest.mark.slow
def test_an_observer_hears_of_a_commit_that_fails(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.cache.store import Cache

    heard: list[str] = []

    class Ear(NullObserver):
        def stage_failed(self, stage: str, error: BaseException) -> None:
            heard.append(f"{stage}: {error}")

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(Cache, "commit", full)
        with pytest.raises(OSError, match="no space left"):
            run_stage(tiny.module.GRAPH["alpha"], tiny.settings(), tiny.runtime, observer=Ear(), project=tiny.project)
    assert heard == ["alpha: no space left"]
    assert tiny.run("alpha").state == "ran"


def test_a_full_disk_is_one_clear_line(tiny: Tiny) -> None:
    tiny.edit("alpha", "    x = ", "    import errno\n    raise OSError(errno.ENOSPC, 'No space left')\n    x = ")
    with pytest.raises(StageFailed, match=r"disk full below .* free some space and run again"):
        tiny.run("alpha")


@pytest.mark.slow
def test_a_stage_on_the_command_line_is_the_same_cache(tiny: Tiny) -> None:
    assert tiny.start("alpha").communicate()[0].strip() == "ran"
    assert tiny.run("alpha").state == "cached"
