"""Digests of what lies outside: they follow contents, cost little the second time, and missing things are named."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

import pytest

from conf.load import load_settings
from pipeline.cache.external import external_digest
from pipeline.graph import STAGES
from stages.runtime.errors import InputError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("cats/1.png", "cats/2.png", "dogs/1.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"x" * 10)
    return tmp_path / "images"


def digest(root: Path, home: Path) -> str | None:
    settings, _ = load_settings(overrides=[f"dataset.root={root}"])
    return external_digest(STAGES["dataset"], settings.dataset, home)


def test_a_listing_follows_files_and_sizes_not_the_place(images: Path, tmp_path: Path) -> None:
    first = digest(images, tmp_path)
    assert digest(images, tmp_path) == first
    (images / "cats/3.png").write_bytes(b"new")
    assert (second := digest(images, tmp_path)) != first
    (images / "cats/3.png").rename(images / "dogs/3.png")
    assert digest(images, tmp_path) not in {first, second}
    (images / "dogs/3.png").unlink()
    assert digest(images, tmp_path) == first
    images.rename(tmp_path / "moved")
    assert digest(tmp_path / "moved", tmp_path) == first


def test_a_second_look_lists_no_folder_that_has_not_changed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest(images, tmp_path)
    listed: list[str] = []
    scandir = os.scandir

    def spy(path: Path) -> object:
        listed.append(Path(path).name)
        return scandir(path)

    monkeypatch.setattr("os.scandir", spy)
    digest(images, tmp_path)
    assert listed == []
    (images / "dogs/2.png").write_bytes(b"new")
    digest(images, tmp_path)
    assert listed == ["dogs"]


def test_a_class_folder_may_be_a_link_and_a_folder_inside_it_may_not(images: Path, tmp_path: Path) -> None:
    # As stages.images.sources lists them; a link deeper down could lead round in a circle.
    linked = tmp_path / "birds"
    linked.mkdir()
    before = digest(images, tmp_path)
    (images / "birds").symlink_to(linked)
    with_link = digest(images, tmp_path)
    (linked / "1.png").write_bytes(b"new")
    with_image = digest(images, tmp_path)
    assert len({before, with_link, with_image}) == 3
    (linked / "all").symlink_to(images)
    assert digest(images, tmp_path) == with_image


def test_hidden_files_and_folders_do_not_count(images: Path, tmp_path: Path) -> None:
    before = digest(images, tmp_path)
    (images / "cats/.DS_Store").write_bytes(b"hidden")
    (images / ".cache").mkdir()
    (images / ".cache/1.png").write_bytes(b"hidden")
    assert digest(images, tmp_path) == before


def test_a_damaged_memory_costs_only_time(images: Path, tmp_path: Path) -> None:
    first = digest(images, tmp_path)
    (tmp_path / ".listings.json").write_text("{broken")
    assert digest(images, tmp_path) == first


def test_weights_are_known_by_their_contents_and_missing_ones_by_their_setting(tmp_path: Path) -> None:
    weights = tmp_path / "vq.safetensors"

    def of_weights() -> str | None:
        settings, _ = load_settings(overrides=[f"tokenizer.checkpoint={weights}"])
        return external_digest(STAGES["tokenizer"], settings.tokenizer, tmp_path)

    with pytest.raises(InputError, match=r"tokenizer.checkpoint is .*vq.safetensors, and there is no such file"):
        of_weights()
    weights.write_bytes(b"one")
    first = of_weights()
    assert of_weights() == first
    weights.write_bytes(b"two")
    os.utime(weights, (1, 1))
    assert of_weights() != first
    settings, _ = load_settings("demo", None, ["tokenizer.source=train", "tokenizer.checkpoint=no-such-file"])
    assert external_digest(STAGES["tokenizer"], settings.tokenizer, tmp_path) is None


def test_a_tar_is_known_by_the_headers_of_its_class_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(path: Path, *names: str) -> Path:
        with tarfile.open(path, "w") as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name))
        return path

    def of_tar(path: Path) -> str | None:
        settings, _ = load_settings(overrides=["dataset.source=imagenet_tar", f"dataset.root={path}"])
        return external_digest(STAGES["dataset"], settings.dataset, tmp_path)

    first = of_tar(pack(tmp_path / "one.tar", "n01.tar", "n02.tar"))
    assert of_tar(pack(tmp_path / "elsewhere.tar", "n01.tar", "n02.tar")) == first
    assert of_tar(pack(tmp_path / "two.tar", "n01.tar", "n03.tar")) != first
    monkeypatch.setattr("pipeline.cache.external.headers", None)  # a second look reads none
    assert of_tar(tmp_path / "one.tar") == first


def test_an_imported_transformer_is_known_by_its_contents_and_a_trained_one_reads_none(tmp_path: Path) -> None:
    weights = tmp_path / "c2i_B_256.pt"
    rival = ["train.family=llamagen", f"train.checkpoint={weights}"]

    def of_weights(*overrides: str) -> str | None:
        settings, _ = load_settings(overrides=[*rival, *overrides])
        return external_digest(STAGES["train"], settings.train, tmp_path)

    assert of_weights() is None
    with pytest.raises(InputError, match=r"train.checkpoint is .*c2i_B_256.pt, and there is no such file"):
        of_weights("train.source=checkpoint")
    weights.write_bytes(b"weights")
    assert of_weights("train.source=checkpoint") == hashlib.sha256(b"weights").hexdigest()


def test_a_missing_image_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        digest(tmp_path / "nowhere", tmp_path)
