"""Digests of what lies outside: they follow contents, cost little the second time, and missing things are named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conf.load import load_settings
from pipeline.external import external_digest
from pipeline.graph import STAGES
from stages.errors import InputError


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
    (images / "dogs/2.png").write_bytes(b"new")
    listed: list[str] = []
    scandir = os.scandir

    def spy(path: str) -> object:
        listed.append(Path(path).name)
        return scandir(path)

    monkeypatch.setattr("pipeline.external.os.scandir", spy)
    monkeypatch.setattr("pipeline.external._folders", lambda root: [root, root / "cats", root / "dogs"])
    digest(images, tmp_path)
    assert "cats" not in listed[-1:]
    assert "dogs" in listed


def test_a_damaged_memory_costs_only_time(images: Path, tmp_path: Path) -> None:
    first = digest(images, tmp_path)
    (tmp_path / ".listing.json").write_text("{broken")
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
    settings, _ = load_settings("tiny")
    assert external_digest(STAGES["tokenizer"], settings.tokenizer, tmp_path) is None


def test_a_missing_image_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        digest(tmp_path / "nowhere", tmp_path)
