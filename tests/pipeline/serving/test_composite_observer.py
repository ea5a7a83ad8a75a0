from pathlib import Path

from pipeline.runner import NullObserver
from pipeline.serving.composite_observer import CompositeObserver


def test_events_reach_all_observers(tmp_path: Path) -> None:
    heard: list[str] = []

    class Listener(NullObserver):
        def stage_waiting(self, stage: str, message: str) -> None:
            heard.append(message)

        def stage_started(self, stage: str, key: str, work: Path) -> None:
            heard.append(key)

        def stage_failed(self, stage: str, error: BaseException) -> None:
            heard.append(str(error))

    both = CompositeObserver([Listener(), Listener()])
    both.stage_waiting("train", "process 7")
    both.stage_started("train", "train-1", tmp_path)
    both.stage_progress("train", {})
    both.stage_failed("train", RuntimeError("no"))
    assert heard == ["process 7", "process 7", "train-1", "train-1", "no", "no"]
