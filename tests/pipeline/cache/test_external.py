"""Digests of external weights cover their bytes. For images see `test_listing`."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.load import load_settings
from pipeline.cache.external import external_digest, trusted_since
from pipeline.graph import STAGES
from stages.runtime.errors import InputError


def of_tokenizer(weights: Path, home: Path, *, deep: bool = False) -> str | None:
    settings, _ = load_settings(overrides=[f"tokenizer.checkpoint={weights}"])
    return external_digest(STAGES["tokenizer"], settings.tokenizer, home, deep=deep)


def test_weights_are_known_by_their_contents_and_missing_ones_by_their_setting(tmp_path: Path) -> None:
    weights = tmp_path / "vq.safetensors"
    with pytest.raises(InputError, match=r"tokenizer.checkpoint is .*vq.safetensors, but there is no such file"):
        of_tokenizer(weights, tmp_path)
    weights.write_bytes(b"one")
    assert of_tokenizer(weights, tmp_path) == hashlib.sha256(b"one").hexdigest()
    settings, _ = load_settings("demo", None, ["tokenizer.source=train", "tokenizer.checkpoint=no-such-file"])
    assert external_digest(STAGES["tokenizer"], settings.tokenizer, tmp_path) is None


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("kind", "target"), [("a FIFO", None), ("a device", "/dev/zero"), ("a folder", "/")])
def test_weights_that_are_no_regular_file_are_refused_at_once(tmp_path: Path, kind: str, target: str | None) -> None:
    weights = tmp_path / "vq.safetensors"
    if target is None:
        os.mkfifo(weights)
    else:
        weights.symlink_to(target)
    with pytest.raises(InputError, match=rf"tokenizer.checkpoint: .*vq.safetensors is {kind}.*, expected a"):
        of_tokenizer(weights, tmp_path)


def test_images_whose_folder_cannot_be_listed_are_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images" / "a" / "deep").mkdir(parents=True)
    settings, _ = load_settings(overrides=[f"dataset.root={tmp_path / 'images'}"])
    monkeypatch.setattr("pipeline.cache.listing.os.stat", gone_once_listed(tmp_path / "images" / "a" / "deep"))
    with pytest.raises(InputError, match=r"/a/deep cannot be listed \(No such file or directory\)"):
        external_digest(STAGES["dataset"], settings.dataset, tmp_path / "home")
    assert trusted_since(settings, tmp_path / "home") is None


def gone_once_listed(folder: Path) -> Callable[..., os.stat_result]:
    """`os.stat` for a listing during which a folder is removed."""
    stat = os.stat

    def look(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path == folder:
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()
        return stat(path, follow_symlinks=follow_symlinks)

    return look


def test_weights_are_read_once_and_again_when_anything_about_the_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bytes] = []

    def spy(path: Path) -> str:
        read.append(path.read_bytes())
        return hashlib.sha256(read[-1]).hexdigest()

    monkeypatch.setattr("pipeline.cache.external.file_sha256", spy)
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"one")
    two.write_bytes(b"two")
    link = tmp_path / "weights"
    link.symlink_to(one)
    for path in (one, two):
        os.utime(path, (5, 5))
    first = of_tokenizer(link, tmp_path)
    assert of_tokenizer(link, tmp_path) == first
    assert read == [b"one"]
    with one.open("r+b") as file:  # same size and times
        file.write(b"eno")
    os.utime(one, (5, 5))
    assert of_tokenizer(link, tmp_path) == hashlib.sha256(b"eno").hexdigest()
    link.unlink()
    link.symlink_to(two)
    assert of_tokenizer(link, tmp_path) == hashlib.sha256(b"two").hexdigest()
    assert read == [b"one", b"eno", b"two"]
    of_tokenizer(link, tmp_path, deep=True)
    assert read == [b"one", b"eno", b"two", b"two"]
    (tmp_path / ".digests.json").write_text("{broken")
    assert of_tokenizer(link, tmp_path) == hashlib.sha256(b"two").hexdigest()


def test_an_imported_transformer_is_known_by_its_contents_and_a_trained_one_reads_none(tmp_path: Path) -> None:
    weights = tmp_path / "c2i_B_256.pt"
    baseline = ["train.family=llamagen", f"train.checkpoint={weights}"]

    def of_weights(*overrides: str) -> str | None:
        settings, _ = load_settings(overrides=[*baseline, *overrides])
        return external_digest(STAGES["train"], settings.train, tmp_path)

    assert of_weights() is None
    with pytest.raises(InputError, match=r"train.checkpoint is .*c2i_B_256.pt, but there is no such file"):
        of_weights("train.source=checkpoint")
    weights.write_bytes(b"weights")
    assert of_weights("train.source=checkpoint") == hashlib.sha256(b"weights").hexdigest()


def test_a_missing_image_root_is_named(tmp_path: Path) -> None:
    settings, _ = load_settings(overrides=[f"dataset.root={tmp_path / 'nowhere'}"])
    with pytest.raises(InputError, match="nowhere"):
        external_digest(STAGES["dataset"], settings.dataset, tmp_path)
    assert trusted_since(settings, tmp_path) is None


@pytest.mark.parametrize("address", ["tokenizer", "entropy_model", "train"])
def test_what_is_known_to_be_no_weights_is_named_before_any_stage_runs(tmp_path: Path, address: str) -> None:
    path = tmp_path / "weights.safetensors"
    chosen = [f"{address}.source=checkpoint", f"{address}.checkpoint={path}"]
    settings, _ = load_settings(overrides=chosen)

    def problem() -> str:
        with pytest.raises(InputError) as caught:
            external_digest(STAGES[address], getattr(settings, address), tmp_path)
        return str(caught.value)

    path.mkdir()
    (path / "model.safetensors").touch()
    found = f"{address}.checkpoint: {path} is a folder with model.safetensors"
    assert problem() == f"{found}, expected a weights file: give one of its files"
    (path / "model.safetensors").unlink()
    path.rmdir()
    os.mkfifo(path)
    assert "is a FIFO, expected a regular file" in problem()
    path.unlink()
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    assert "is a Git LFS pointer, not the weights, expected weights: run `git lfs pull`" in problem()
