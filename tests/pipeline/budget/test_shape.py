"""Number of images and their origin; sizes that follow from the settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.load import load_settings
from conf.runtime import RuntimeConfig
from pipeline.budget import images
from pipeline.budget.images import IMAGENET, ImageCount, count_images
from pipeline.budget.shape import shape_of
from stages.runtime.errors import InputError


def test_images_of_a_preset_are_imagenets_without_any_file(tmp_path: Path) -> None:
    settings, runtime = load_settings("imagenet256-l", None, [f"runtime.home={tmp_path}"])
    assert count_images(settings, runtime, "imagenet256-l") == (*IMAGENET, "ImageNet, training images")
    assert count_images(settings, runtime, "imagenet256-l", 500) == (500, 1000, "--images")


def test_images_of_a_folder_are_counted(image_root: Path, tmp_path: Path) -> None:
    settings, runtime = load_settings("tiny", None, [f"dataset.root={image_root}", f"runtime.home={tmp_path}"])
    assert count_images(settings, runtime, "tiny") == (45, 3, f"count of {image_root}")


def test_a_folder_that_is_not_there_is_a_user_error(tmp_path: Path) -> None:
    settings, runtime = load_settings("tiny", None, [f"dataset.root={tmp_path / 'missing'}"])
    with pytest.raises(InputError, match="is missing"):
        count_images(settings, runtime, "tiny")


def test_the_cached_index_wins(tiny_artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_indexed", lambda settings, runtime: images._of_index(tiny_artifacts["dataset"]))
    settings, _ = load_settings("imagenet256-l")
    assert count_images(settings, RuntimeConfig(), "imagenet256-l") == (45, 3, "index of stage dataset")
    assert count_images(settings, RuntimeConfig(), "imagenet256-l", 7) == (7, 3, "--images")


def test_sizes_follow_from_the_settings() -> None:
    settings, _ = load_settings("imagenet384-l", None, ["dataset.heldout_fraction=0.1"])
    shape = shape_of(settings, *ImageCount(1000, 10, "test"))
    assert (shape.heldout, shape.train_images, shape.views, shape.num_views) == (100, 900, 20, 20_000)
    assert (shape.tokens.num_tokens, shape.tokens.codebook_size, shape.tokens.num_classes) == (576, 16384, 10)
    assert (shape.mean_length, shape.length_origin) == (2.06, "the paper at 384 px")
    assert (shape.reference_images(settings), shape.rung_images(settings)) == (900, 100)


@pytest.mark.parametrize(
    ("ablation", "overrides", "length"),
    [
        (None, ["patch_index.threshold=null", "patch_index.target_mean_length=2.5"], 2.5),
        ("static", [], 1.8191),
        (None, ["tokenize.image_size=128"], 1.38),
        (None, ["tokenize.image_size=160"], 1.81),
    ],
)
def test_the_mean_patch_length(ablation: str | None, overrides: list[str], length: float) -> None:
    settings, _ = load_settings("imagenet256-b", ablation, overrides)
    assert shape_of(settings, *IMAGENET, "").mean_length == length
