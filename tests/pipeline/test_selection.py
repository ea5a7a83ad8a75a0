from pathlib import Path
from typing import Any

import pytest

from pipeline.graph import STAGES
from pipeline.plan import StageStatus
from pipeline.selection import asked_for, known_stage, select
from stages.runtime.errors import InputError


def statuses(**states: Any) -> list[StageStatus]:
    return [StageStatus(name, states.get(name, "cached"), "a reason", f"{name}-0", Path(name)) for name in STAGES]


def test_without_bounds_everything_is_asked_for() -> None:
    assert select() == list(STAGES)


def test_until_asks_for_what_the_stage_needs_and_nothing_else() -> None:
    assert select(until_stage="tokenizer") == ["dataset", "tokenizer"]


def test_from_asks_for_what_depends_on_the_stage() -> None:
    assert select(from_stage="train") == ["train", "entropy_head", "sample", "evaluate"]
    assert select(from_stage="patch_index", until_stage="train") == ["patch_index", "train"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"from_stage": "nosuch"}, "stage is 'nosuch', expected one of dataset, "),
        ({"until_stage": "nosuch"}, "stage is 'nosuch'"),
        ({"force": ["nosuch"]}, "stage is 'nosuch'"),
        ({"from_stage": "train", "until_stage": "tokenize"}, "tokenize comes first"),
        ({"from_stage": "train", "force": ["dataset"]}, "--force dataset is not among"),
    ],
)
def test_a_choice_that_makes_no_sense_is_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select(**arguments)


def test_a_known_stage_is_itself() -> None:
    assert known_stage("train") == "train"


def test_what_comes_before_must_be_cached() -> None:
    with pytest.raises(InputError, match=r"tokenize is stale \(a reason\).*dpar run --until tokenize"):
        asked_for(statuses(tokenize="stale", train="missing"), ["train"])


def test_stages_that_nothing_asked_for_needs_may_be_missing() -> None:
    found = asked_for(statuses(evaluate="missing", train="stale"), ["patch_index", "train"])
    assert [(status.stage, status.state) for status in found] == [("patch_index", "cached"), ("train", "stale")]


def test_a_forced_stage_is_shown_as_one_that_will_run() -> None:
    found = asked_for(statuses(sample="missing"), ["train", "sample"], force=["train", "sample"])
    assert [(status.state, status.reason) for status in found] == [
        ("stale", "asked for by --force"),
        ("missing", "a reason"),
    ]
