"""Keys: equal runs have equal keys, different runs have different keys, and no key depends on the machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from conf.load import load_settings
from pipeline.cache.keys import key_parts
from pipeline.cache.manifest import key_of
from pipeline.graph import STAGES, inputs_read
from pipeline.project import DPAR


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images/cats").mkdir(parents=True)
    (tmp_path / "images/cats/1.png").write_bytes(b"never opened")
    return tmp_path / "images"


def parts_of(images: Path, *overrides: str, inputs: str = "digest") -> dict[str, dict[str, Any]]:
    """Key parts of every stage; all inputs have the same content digest."""
    settings, runtime = load_settings("tiny", None, [f"dataset.root={images}", *overrides])
    home = images.parent / runtime.home
    return {
        name: key_parts(
            stage, settings, home, dict.fromkeys(inputs_read(stage, settings), inputs), DPAR.fingerprint(stage, home)
        )
        for name, stage in STAGES.items()
    }


def changed(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name in STAGES if key_of(before[name]) != key_of(after[name])}


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("patch_index.target_mean_length=2.7", {"patch_index"}),
        ("train.training.learning_rate=0.01", {"train"}),
        ("sample.seed=7", {"sample"}),
        ("tokenize.views=center", {"tokenize"}),
    ],
)
def test_a_setting_is_in_the_key_of_its_own_stage_only(images: Path, override: str, stages: set[str]) -> None:
    assert changed(parts_of(images), parts_of(images, override)) == stages


@pytest.mark.parametrize("name", ["processes=2", "threads=3", "device=cpu", "log_level=debug", "tracking=false"])
def test_where_and_how_a_run_happens_is_in_no_key(images: Path, name: str) -> None:
    assert changed(parts_of(images), parts_of(images, f"runtime.{name}")) == set()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train.training.learning_rate=1e-4", "train.training.learning_rate=0.0001"),
        ("train.training.betas=[0, 1]", "train.training.betas=[0.0, 1.0]"),
        ("tokenizer.training.weight_decay=0", "tokenizer.training.weight_decay=0.0"),
        (
            "train.model=B",
            'train.model={"dim": 768, "num_heads": 12, "encoder_layers": 1, "global_layers": 8, "decoder_layers": 3}',
        ),
    ],
)
def test_two_ways_to_write_a_setting_have_one_key(images: Path, one: str, other: str) -> None:
    assert changed(parts_of(images, one), parts_of(images, other)) == set()


def test_images_count_by_their_metadata_and_not_by_their_place(images: Path) -> None:
    before = parts_of(images)
    moved = shutil.move(images, images.with_name("moved"))
    assert changed(before, parts_of(moved)) == set()
    (moved / "cats/2.png").write_bytes(b"new")
    assert changed(before, parts_of(moved)) == {"dataset"}


def test_other_contents_of_an_input_change_every_key_that_has_one(images: Path) -> None:
    assert changed(parts_of(images), parts_of(images, inputs="other")) == {n for n, s in STAGES.items() if s.inputs}


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.family=dpar", {"tokenize", "patch_index"}),
        ("train.entropy_head.kind=block", {"tokenize", "entropy_map", "patch_index"}),
        ("train.family=llamagen", {"tokenize"}),
        ("train.family=npp", {"tokenize"}),
    ],
)
def test_what_a_model_does_not_read_is_not_in_its_key(images: Path, override: str, read: set[str]) -> None:
    assert set(parts_of(images, override)["train"]["inputs"]) == read


def test_a_key_does_not_depend_on_the_order_of_its_parts(images: Path) -> None:
    parts = parts_of(images)["train"]
    assert key_of(dict(reversed(parts.items()))) == key_of(parts)
    assert key_of(parts).startswith("train-")
