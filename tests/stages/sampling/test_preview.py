"""Previews: the samples of the stage, captioned; a real image continued; clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from stages.images.decode import center_crop
from stages.images.tensors import pixels_to_float
from stages.runtime.errors import InputError
from stages.sampling.preview import Prefix, PreviewReport, Request, chosen_classes, continue_image, preview, spread
from stages.sampling.sampler import Sampler
from stages.stores.tokens import TokenStore

NAMES = ["cat", "Dog", "7"]
RUNTIME = RuntimeConfig(device="cpu", threads=1)
Calls = list[tuple[int, int]]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is sampled, batch by batch."""
    made: list[dict[str, Any]] = []
    sample = Sampler.sample

    def remember(self: Sampler, numbers: Any, labels: Any, prefix: Any = None) -> Any:
        batch = sample(self, numbers, labels, prefix)
        made.append({"numbers": numbers, "prefix": prefix, **batch})
        return batch

    monkeypatch.setattr(Sampler, "sample", remember)
    return made


def test_classes_are_names_or_numbers() -> None:
    assert chosen_classes(["dog", "0"], NAMES).tolist() == [1, 0]
    assert chosen_classes(["7"], NAMES).tolist() == [2], "a name before a number"
    assert chosen_classes([], NAMES).tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"class '3' is unknown, expected a number 0\.\.2 or a name, as 'cat'"):
        chosen_classes(["1", "3"], NAMES)


def test_images_are_shared_out_among_the_classes() -> None:
    assert spread(np.array([4, 9]), 5).tolist() == [4, 9, 4, 9, 4]
    assert spread(np.arange(1000), 4).tolist() == [0, 333, 666, 999]


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_a_preview_shows_the_samples_of_the_stage(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, tmp_path: Path, batches: list[dict[str, Any]]
) -> None:
    before = {path: path.stat().st_mtime_ns for folder in tiny_artifacts.values() for path in folder.rglob("*")}
    told: Calls = []
    request = Request(classes=["stripes", "0"], count=9, patches=False, output=tmp_path / "new" / "preview.png")
    found = preview(tiny_settings.sample, tiny_artifacts, RUNTIME, request, lambda *counts: told.append(counts))
    assert told == [(0, 9), (8, 9), (9, 9)]
    assert found.classes == ["discs"] * 4 + ["stripes"] * 5
    starts = np.concatenate([batch["patch_starts"] for batch in batches])
    assert found.mean_patch_length == pytest.approx(starts.size / starts.sum())
    assert found.seconds_per_image > 0
    assert np.concatenate([batch["numbers"] for batch in batches]).tolist() == list(range(9))
    with Image.open(tmp_path / "new" / "preview.png") as picture:
        assert picture.width == 3 * (192 + 6) + 6
        shown = np.asarray(picture)[6 : 6 + 192 : 6, 6 : 6 + 192 : 6]
    assert np.array_equal(shown, batches[0]["images"][0]), "pixels stay squares"
    after = {path: path.stat().st_mtime_ns for folder in tiny_artifacts.values() for path in folder.rglob("*")}
    assert after == before
    assert [path.name for path in tmp_path.rglob("*.*")] == ["preview.png"]


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_patches_are_outlined_where_they_start(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, tmp_path: Path
) -> None:
    pictures = []
    for patches in (False, True):
        request = Request(classes=["0"], count=2, patches=patches, output=tmp_path / f"{patches}.png")
        preview(tiny_settings.sample, tiny_artifacts, RUNTIME, request, lambda *_: None)
        pictures.append(np.asarray(Image.open(request.output)).astype(int))
    red = [int(((picture[..., 0] - picture[..., 1]) > 150).sum()) for picture in pictures]
    assert red[1] > red[0] + 192 * 8  # each of two images has eight rows of patches at least


def continued(
    artifacts: dict[str, Path], settings: Settings, image: Path, output: Path, **changes: Any
) -> PreviewReport:
    request = Request(classes=changes.get("classes", ["1"]), count=3, patches=False, output=output)
    prefix = Prefix(image=image, keep_rows=changes.get("keep_rows", 3))
    return continue_image(settings.sample, artifacts, RUNTIME, request, prefix, lambda *_: None)


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_a_continuation_keeps_the_first_rows_of_the_real_image(
    tiny_artifacts: dict[str, Path],
    tiny_settings: Settings,
    image_root: Path,
    tmp_path: Path,
    batches: list[dict[str, Any]],
) -> None:
    image = image_root / "discs" / "00.png"
    found = continued(tiny_artifacts, tiny_settings, image, tmp_path / "preview.png")
    assert found.classes == ["squares"] * 3
    store = TokenStore.of(tiny_artifacts)
    sampler = Sampler.load(tiny_settings.sample, tiny_artifacts, store, torch.device("cpu"))
    pixels = pixels_to_float(np.stack([center_crop(Image.open(image), 32)]))
    with torch.inference_mode():
        tokens = sampler.vq.encode(pixels).numpy()
    sampled = batches[0]["tokens"]
    assert np.array_equal(sampled[:, :24], np.repeat(tokens[:, :24], 3, axis=0))
    assert len(np.unique(sampled, axis=0)) == 3
    with Image.open(tmp_path / "preview.png") as picture:
        assert picture.width == 5 * (192 + 6) + 6  # original, kept rows, three continuations
        kept = np.asarray(picture)[6 : 6 + 192, 6 + 198 : 6 + 198 + 192]
    assert (kept[192 * 3 // 8 :] == 235).all()
    assert not (kept[: 192 * 3 // 8] == 235).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep_rows": 8}, r"--keep-rows is 8, expected 1\.\.7: an image has 8 rows of tokens"),
        ({"keep_rows": 0}, r"--keep-rows is 0, expected 1\.\.7"),
        ({"classes": []}, "no class is given for the continuation, expected at least one: set --classes"),
        ({"classes": ["hexagons"]}, r"class 'hexagons' is unknown, expected a number 0\.\.2 or a name, as 'discs'"),
        ({"image": "missing.png"}, r"image .*missing\.png cannot be read \(No such file"),
        ({"image": "text.png"}, r"image .*text\.png cannot be decoded \(not an image of a known format\)"),
    ],
)
def test_requests_that_make_no_sense_are_refused_in_a_line(
    tiny_artifacts: dict[str, Path],
    tiny_settings: Settings,
    image_root: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    words: str,
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    changes = dict(changes)
    image = tmp_path / changes.pop("image") if "image" in changes else image_root / "discs" / "00.png"
    with pytest.raises(InputError, match=words):
        continued(tiny_artifacts, tiny_settings, image, tmp_path / "preview.png", **changes)
    assert not (tmp_path / "preview.png").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_half_of_the_rows_stay_unless_told_otherwise(
    tiny_artifacts: dict[str, Path],
    tiny_settings: Settings,
    image_root: Path,
    tmp_path: Path,
    batches: list[dict[str, Any]],
) -> None:
    continued(tiny_artifacts, tiny_settings, image_root / "discs" / "00.png", tmp_path / "preview.png", keep_rows=None)
    assert batches[0]["prefix"].shape == (3, 32)
