import logging
from pathlib import Path

import pytest

from pipeline.runner import NullObserver, StageResult
from pipeline.serving.relay import CompositeObserver, LogRelay


def relay_of(caplog: pytest.LogCaptureFixture) -> LogRelay:
    caplog.set_level(logging.INFO)
    return LogRelay(logging.getLogger)


def write(work: Path, text: str) -> None:
    (work / "record").mkdir(exist_ok=True)
    with (work / "record" / "log.txt").open("a") as file:
        file.write(text)


def test_only_what_this_attempt_writes_is_passed_on_to_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    relay = relay_of(caplog)
    write(tmp_path, "of a killed attempt\n")
    relay.stage_started("train", "train-1", tmp_path)
    write(tmp_path, "one\ntwo")
    relay.stage_progress("train", {})
    write(tmp_path, " words\nthree\n")
    relay.stage_finished(StageResult("train", "ran", "train-1", tmp_path, "", {}, 1.0))
    assert caplog.messages[1:] == ["one", "two words", "three"]


def test_a_chatty_stage_does_not_flood_the_page(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    relay = relay_of(caplog)
    relay.stage_started("train", "train-1", tmp_path)
    write(tmp_path, "".join(f"line {number}\n" for number in range(1000)))
    relay.stage_failed("train", RuntimeError())
    assert caplog.messages[1:3] == ["(960 lines left out)", "line 960"]
    assert caplog.messages[-1] == "line 999"


def test_a_cached_stage_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    relay = relay_of(caplog)
    write(tmp_path, "long ago\n")
    relay.stage_finished(StageResult("train", "cached", "train-1", tmp_path, "", {}, 1.0))
    assert caplog.messages == []


def test_events_reach_all_observers(tmp_path: Path) -> None:
    heard: list[str] = []

    class Listener(NullObserver):
        def stage_started(self, stage: str, key: str, work: Path) -> None:
            heard.append(key)

        def stage_failed(self, stage: str, error: BaseException) -> None:
            heard.append(str(error))

    both = CompositeObserver([Listener(), Listener()])
    both.stage_started("train", "train-1", tmp_path)
    both.stage_progress("train", {})
    both.stage_failed("train", RuntimeError("no"))
    assert heard == ["train-1", "train-1", "no", "no"]
