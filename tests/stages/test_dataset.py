import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stages.dataset
from conf.schema import DatasetConfig, RuntimeConfig
from stages.dataset import dataset
from stages.errors import ArtifactError, InputError
from stages.sources import image_root
from stages.stores.files import ImageIndex


def make_images(root: Path, classes: str = "ab", count: int = 10) -> None:
    generator = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}{number}.png")


def run(root: Path, output: Path, **settings: object) -> ImageIndex:
    config = DatasetConfig(root=root, **settings)
    dataset(config, {"images": image_root(config)}, output, RuntimeConfig(threads=2))
    return ImageIndex.open(output)


def content(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def test_the_index_holds_every_image_with_its_facts(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    index = run(tmp_path / "images", tmp_path / "out")
    assert index.classes == ["a", "b"]
    assert list(index.relpaths) == sorted(f"{name}/{name}{number}.png" for name in "ab" for number in range(10))
    assert index.labels.tolist() == [0] * 10 + [1] * 10
    assert (len(index), index.num_train, index.num_heldout, index.source) == (20, 20, 0, "image_folder")
    data = (tmp_path / "images" / index.relpaths[13]).read_bytes()
    assert index.read(tmp_path / "images", 13) == data
    assert index.sizes[13] == len(data)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {
        "num_images": 20,
        "num_train": 20,
        "num_heldout": 0,
        "num_classes": 2,
        "num_broken": 0,
    }


def test_held_out_images_come_last_and_are_a_share_of_each_class(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    index = run(tmp_path / "images", tmp_path / "out", heldout_fraction=0.3)
    train, heldout = list(index.relpaths[: index.num_train]), list(index.relpaths[index.num_train :])
    assert (index.num_train, index.num_heldout) == (14, 6)
    assert [path[0] for path in heldout] == ["a"] * 3 + ["b"] * 3
    assert train == sorted(train)
    assert heldout == sorted(heldout)
    assert not set(train) & set(heldout)


def test_who_is_held_out_depends_on_file_names_alone(tmp_path: Path) -> None:
    make_images(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "a").rename(tmp_path / "two" / "z")
    first = run(tmp_path / "one", tmp_path / "out1", heldout_fraction=0.2)
    second = run(tmp_path / "two", tmp_path / "out2", heldout_fraction=0.2)
    names = [{path[2:] for path in index.relpaths[index.num_train :]} for index in (first, second)]
    assert names[0] == names[1]


def test_broken_images_are_listed_with_their_reason_and_left_out(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    cut = tmp_path / "images" / "a" / "a3.png"
    cut.write_bytes(cut.read_bytes()[:300])
    (tmp_path / "images" / "b" / "b7.png").write_bytes(b"hello")
    index = run(tmp_path / "images", tmp_path / "out", max_broken_fraction=0.1)
    broken = json.loads((tmp_path / "out" / "broken.json").read_text())
    assert [entry["relpath"] for entry in broken] == ["a/a3.png", "b/b7.png"]
    assert "truncated" in broken[0]["reason"]
    assert broken[1]["reason"] == "not an image of a known format"
    assert len(index) == 18
    assert not {"a/a3.png", "b/b7.png"} & set(index.relpaths)


def test_too_many_broken_images_fail_and_are_named(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    (tmp_path / "images" / "b" / "b7.png").write_bytes(b"hello")
    with pytest.raises(InputError, match=r"1 of 20 images are broken, expected at most 4\.00%.*b/b7\.png \(not an"):
        run(tmp_path / "images", tmp_path / "out", max_broken_fraction=0.04)


def test_a_class_that_lost_all_its_images_fails(tmp_path: Path) -> None:
    make_images(tmp_path / "images", "ab", 1)
    (tmp_path / "images" / "b" / "b0.png").write_bytes(b"hello")
    with pytest.raises(InputError, match="class b holds no image that decodes"):
        run(tmp_path / "images", tmp_path / "out", max_broken_fraction=0.5)


def test_an_image_that_changed_or_went_is_noticed_when_read(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    index = run(tmp_path / "images", tmp_path / "out")
    path = tmp_path / "images" / index.relpaths[4]
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # same size, other bytes
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"{path.name} is not the file that the dataset stage indexed"):
        index.read(tmp_path / "images", 4)
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name} cannot be read"):
        index.read(tmp_path / "images", 4)


def test_a_killed_attempt_is_continued_without_reading_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.dataset, "BLOCK", 8)
    make_images(tmp_path / "images")
    run(tmp_path / "images", tmp_path / "whole", heldout_fraction=0.2)

    read: list[str] = []
    original = stages.dataset._check

    def dies_in_the_second_block(paths: list[Path]) -> stages.dataset.Checked:
        if "a9.png" in {path.name for path in paths}:
            raise KeyboardInterrupt
        return original(paths)

    def counting(paths: list[Path]) -> stages.dataset.Checked:
        read.extend(path.name for path in paths)
        return original(paths)

    monkeypatch.setattr(stages.dataset, "_check", dies_in_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "images", tmp_path / "killed", heldout_fraction=0.2)
    monkeypatch.setattr(stages.dataset, "_check", counting)
    run(tmp_path / "images", tmp_path / "killed", heldout_fraction=0.2)
    assert len(read) == 12
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_file_changed_since_the_killed_attempt_is_read_again(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    run(tmp_path / "images", tmp_path / "out")
    (tmp_path / "images" / "a" / "a1.png").write_bytes((tmp_path / "images" / "b" / "b2.png").read_bytes())
    index = run(tmp_path / "images", tmp_path / "out")
    assert index.read(tmp_path / "images", 1) == (tmp_path / "images" / "b" / "b2.png").read_bytes()


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    make_images(tmp_path / "images", "a", 2)
    run(tmp_path / "images", tmp_path / "out")
    path = tmp_path / "out" / "images.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ArtifactError, match=r"images\.parquet cannot be read"):
        ImageIndex.open(tmp_path / "out")
