"""Selection of stages under settings that decide which stages read each other."""

from pathlib import Path
from typing import Any

import pytest

from conf.load import load_settings
from conf.schema import Settings
from pipeline.graph import STAGES
from pipeline.plan import StageStatus
from pipeline.selection import as_options, known_stage, select, selected_statuses
from stages.runtime.errors import InputError

DEMO = load_settings("demo")[0]


def settings(ablation: str | None = None, *overrides: str) -> Settings:
    return load_settings("demo", ablation, overrides)[0]


def statuses(**states: Any) -> list[StageStatus]:
    return [StageStatus(name, states.get(name, "cached"), "a reason", f"{name}-0", Path(name)) for name in STAGES]


def test_without_bounds_all_that_the_last_stage_needs_is_selected() -> None:
    assert select(DEMO) == list(STAGES)


@pytest.mark.parametrize(
    ("ablation", "left_out"),
    [
        ("llamagen", {"entropy_model", "entropy_map", "patch_index", "entropy_head"}),
        ("npp", {"entropy_model", "entropy_map", "patch_index", "entropy_head"}),
        ("static", {"entropy_model", "entropy_map", "entropy_head"}),
        ("entropy-model", {"entropy_head"}),
        ("own-entropy", set()),
        ("longer-patches", set()),
    ],
)
def test_what_nothing_reads_under_the_settings_is_left_out(ablation: str, left_out: set[str]) -> None:
    assert select(settings(ablation)) == [name for name in STAGES if name not in left_out]


def test_until_asks_for_what_the_stage_needs_and_nothing_else() -> None:
    assert select(DEMO, until_stage="tokenizer") == ["dataset", "tokenizer"]
    assert select(settings("llamagen"), until_stage="patch_index") == [
        "dataset", "tokenizer", "tokenize", "entropy_model", "entropy_map", "patch_index",
    ]  # fmt: skip


def test_from_asks_for_what_depends_on_the_stage() -> None:
    assert select(DEMO, from_stage="train") == ["train", "entropy_head", "sample", "evaluate"]
    assert select(DEMO, from_stage="patch_index", until_stage="train") == ["patch_index", "train"]
    assert select(settings("llamagen"), from_stage="train") == ["train", "sample", "evaluate"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"from_stage": "nosuch"}, "stage is 'nosuch', expected one of dataset, "),
        ({"until_stage": "nosuch"}, "stage is 'nosuch'"),
        ({"force": ["nosuch"]}, "stage is 'nosuch'"),
        ({"from_stage": "train", "until_stage": "tokenize"}, "tokenize does not depend on train"),
        ({"from_stage": "train", "force": ["dataset"]}, "--force is dataset, expected one of the selected stages"),
    ],
)
def test_an_impossible_selection_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select(DEMO, **arguments)


def test_a_stage_that_nothing_reads_has_nothing_after_it() -> None:
    with pytest.raises(InputError, match="under these settings evaluate does not depend on patch_index"):
        select(settings("llamagen"), from_stage="patch_index")


def test_a_known_stage_is_itself() -> None:
    assert known_stage("train") == "train"


def test_what_comes_before_must_be_cached() -> None:
    with pytest.raises(InputError, match=r"train reads tokenize, which is stale \(a reason\).*run --until tokenize"):
        selected_statuses(statuses(tokenize="stale", train="missing"), ["train"], DEMO)


def test_the_advice_repeats_the_options_that_were_given() -> None:
    given = as_options("demo", "llamagen", ["train.training.steps=5", "dataset.root=/my images"])
    assert given == " --preset demo --ablation llamagen --set train.training.steps=5 --set 'dataset.root=/my images'"
    with pytest.raises(InputError, match=r"`dpar run --preset demo --until tokenize`"):
        selected_statuses(statuses(tokenize="missing"), ["train"], DEMO, given=" --preset demo")


def test_stages_that_no_selected_one_needs_may_be_missing() -> None:
    found = selected_statuses(statuses(evaluate="missing", train="stale"), ["patch_index", "train"], DEMO)
    assert [(status.stage, status.state) for status in found] == [("patch_index", "cached"), ("train", "stale")]
    baseline = selected_statuses(
        statuses(patch_index="missing", entropy_head="missing"), ["sample"], settings("llamagen")
    )
    assert [status.stage for status in baseline] == ["sample"]


def test_a_forced_stage_is_shown_as_one_that_will_run() -> None:
    found = selected_statuses(statuses(sample="missing"), ["train", "sample"], DEMO, force=["train", "sample"])
    assert [(status.state, status.reason) for status in found] == [
        ("stale", "requested by --force"),
        ("missing", "a reason"),
    ]


def test_a_wrong_weights_file_stops_a_run_before_its_first_stage_and_only_if_it_would_be_read(tmp_path: Path) -> None:
    weights = tmp_path / "vq.pt"
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    given = settings(None, f"tokenizer.checkpoint={weights}")
    before = dict.fromkeys(STAGES, "missing")
    with pytest.raises(InputError, match=r"vq.pt is a Git LFS pointer, .* run `git lfs pull`"):
        selected_statuses(statuses(**before), list(STAGES), given)
    assert selected_statuses(statuses(**before), ["dataset"], given)
    assert selected_statuses(statuses(), list(STAGES), given)
