"""Too few images for the scores are found before the first long stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.load import load_settings
from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.budget.enough import repeated_images, require_enough
from stages.dataset import dataset
from stages.runtime.errors import ArtifactError, InputError

STAGES = ("train", "sample", "evaluate")


def settings(*changes: str) -> Settings:
    return load_settings("tiny", None, changes)[0]


def indexed(folder: Path, count: int, heldout: float) -> Path:
    """The dataset artifact of one class of images."""
    (folder / "images" / "a").mkdir(parents=True)
    for number in range(count):
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(folder / "images" / "a" / f"{number}.png")
    config = settings(f"dataset.root={folder / 'images'}", f"dataset.heldout_fraction={heldout}").dataset
    dataset(config, {"images": folder / "images"}, folder / "out", RuntimeConfig(threads=1))
    return folder / "out"


@pytest.mark.parametrize("setting", ["sample.num_samples=3", "evaluate.compared=2", "evaluate.max_reference=1"])
def test_settings_with_fewer_images_than_neighbours_are_refused(setting: str) -> None:
    name, number = setting.split("=")
    with pytest.raises(InputError, match=rf"{name} is {number}, expected more than 3, the neighbours of precision"):
        require_enough(settings(setting), STAGES, None)
    require_enough(settings(setting, f"evaluate.neighbours={int(number) - 1 or 1}"), ["sample"], None)
    require_enough(settings("evaluate.neighbours=11"), STAGES, None)


def test_a_data_set_with_too_few_training_images_is_refused(tmp_path: Path) -> None:
    made = indexed(tmp_path, 3, 0)
    with pytest.raises(InputError, match="the data set has 3 training images, expected more than 3"):
        require_enough(settings(), STAGES, made)
    require_enough(settings("evaluate.neighbours=2"), STAGES, made)
    require_enough(settings(), ["train", "sample"], made)


def test_a_single_held_out_image_is_refused_where_it_would_be_scored(tmp_path: Path) -> None:
    made = indexed(tmp_path, 10, 0.1)
    with pytest.raises(InputError, match="one image is held out, expected none or at least two"):
        require_enough(settings(), STAGES, made)
    require_enough(settings("evaluate.ladder=false"), STAGES, made)
    (tmp_path / "out" / "images.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match="cannot be read"):
        require_enough(settings(), STAGES, made)


def test_a_batch_that_is_larger_than_the_data_set_is_told(tmp_path: Path) -> None:
    made = indexed(tmp_path, 6, 0)
    stages = ["tokenizer", "tokenize", "train", "sample"]
    told = list(repeated_images(settings("train.training.global_batch_size=6"), stages, made))
    assert told == [
        "tokenizer.training.global_batch_size is 8 and there are 6 training images: every step takes some of them "
        "several times"
    ]
    assert list(repeated_images(settings("tokenizer.source=checkpoint"), ["tokenizer", "tokenize"], made)) == []
