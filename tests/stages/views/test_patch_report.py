"""The report on patches: its numbers by hand, its pictures, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.patch_index import PatchIndexConfig
from conf.runtime import RuntimeConfig
from stages.images.decode import center_crop, decode
from stages.patch_index import patch_index
from stages.runtime.errors import ArtifactError, InputError
from stages.stores.entropies import EntropyStore, entropy_writer
from stages.stores.image_index import ImageIndex
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenStore
from stages.views.patch_report import PatchReport, patch_report


@pytest.fixture
def inputs(tiny_artifacts: dict[str, Path], image_root: Path) -> dict[str, Path]:
    return tiny_artifacts | {"images": image_root}


def indexed(inputs: dict[str, Path], output: Path, **settings: object) -> dict[str, Path]:
    output.mkdir()
    patch_index(PatchIndexConfig(**settings), inputs, output, RuntimeConfig())
    return inputs | {"patch_index": output}


def test_the_numbers_are_those_of_the_index_and_the_images(inputs: dict[str, Path], tmp_path: Path) -> None:
    inputs = indexed(inputs, tmp_path / "index", target_mean_length=1.8, max_length=3)
    report = patch_report(inputs, tmp_path / "report")
    tokens = TokenStore.of(inputs)
    index = PatchIndex.of(inputs, tokens)
    images = ImageIndex.of(inputs)
    rows = np.arange(len(images))
    store = EntropyStore.of(inputs)
    starts, entropies = index.starts(rows, 0 * rows), store.fetch(rows, 0 * rows)
    threshold = json.loads((inputs["patch_index"] / "rule.json").read_text())["threshold"]
    lengths, by_row, sizes = [], 0, []
    for row in rows:
        places = [*np.flatnonzero(starts[row]), store.num_tokens]
        lengths += list(np.diff(places))
        by_row += sum(entropies[row, place] <= threshold for place in range(store.grid, store.num_tokens, store.grid))
        file = io.BytesIO()
        pixels = center_crop(decode(images.read(inputs["images"], row)), tokens.facts.image_size)
        Image.fromarray(pixels).save(file, "PNG")
        sizes.append(len(file.getvalue()))
    assert report.images == len(rows)
    assert report.mean_length == pytest.approx(np.mean(lengths))
    assert report.share_at_limit == pytest.approx(np.mean(np.array(lengths) == 3))
    assert report.share_by_row == pytest.approx(by_row / len(lengths))
    assert report.png_correlation == pytest.approx(np.corrcoef(sizes, starts.sum(axis=1))[0, 1])
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == vars(report)


def test_pictures_are_written_and_the_same_index_gives_the_same_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        patch_report(inputs, tmp_path / name)
    for name in ("histograms.png", "png_size.png", "extremes.png", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with Image.open(tmp_path / "one" / "extremes.png") as picture:
        assert picture.height > picture.width  # six images below each other


def test_static_patches_have_no_correlation_and_no_limit(inputs: dict[str, Path], tmp_path: Path) -> None:
    inputs = indexed(inputs, tmp_path / "index", mode="static", static_length=2.0)
    report = patch_report(inputs, tmp_path / "report")
    assert report == PatchReport(
        images=report.images, mean_length=2.0, share_at_limit=None, share_by_row=None, png_correlation=None
    )


def test_entropies_are_correlated_with_those_of_another_model(inputs: dict[str, Path], tmp_path: Path) -> None:
    store = EntropyStore.of(inputs)
    rows = np.arange(len(store))
    entropies = store.fetch(rows, 0 * rows)
    noise = np.random.default_rng(0).normal(0, entropies[:, 1:].std(), (len(store), store.num_views, store.num_tokens))
    noise[:, :, 0] = 1e3  # the first token has no prediction and must not count
    writer = entropy_writer(tmp_path / "other" / EntropyStore.FILE, store.facts)
    for unit in writer.pending():
        views = [store.read_block(unit, view) for view in range(store.num_views)]
        here = store.rows(unit)
        writer.write(unit, entropy=(np.stack(views, axis=1) + noise[here]).astype(np.float32))
    writer.finish()
    found = patch_report(inputs, tmp_path / "report", tmp_path / "other").entropy_correlation
    wanted = np.corrcoef(entropies[:, 1:].ravel(), (entropies + noise[:, 0])[:, 1:].ravel())[0, 1]
    assert found == pytest.approx(wanted, abs=1e-6)
    assert 0.5 < wanted < 0.9
    assert patch_report(inputs, tmp_path / "same", inputs["entropy_map"]).entropy_correlation == pytest.approx(1.0)
    assert patch_report(inputs, tmp_path / "alone").entropy_correlation is None


def test_what_cannot_be_compared_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    facts = replace(EntropyStore.of(inputs).facts, tokens_digest="e" * 64)
    writer = entropy_writer(tmp_path / "other" / EntropyStore.FILE, facts)
    shape = (facts.num_images, facts.num_views, facts.num_tokens)
    for unit in writer.pending():
        writer.write(unit, entropy=np.zeros(shape, np.float32)[writer.spec.rows(unit)])
    writer.finish()
    with pytest.raises(InputError, match="belongs to the tokens eeeeeeeeeeee, expected"):
        patch_report(inputs, tmp_path / "report", tmp_path / "other")
    with pytest.raises(InputError, match=r"none holds no entropies\.zarr, expected a finished artifact"):
        patch_report(inputs, tmp_path / "report", tmp_path / "none")
    static = indexed(inputs, tmp_path / "index", mode="static", static_length=2.0)
    with pytest.raises(InputError, match="patches are static"):
        patch_report(static, tmp_path / "report", inputs["entropy_map"])


def test_an_index_of_other_entropies_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(inputs["entropy_map"], tmp_path / "entropies")
    metadata = tmp_path / "entropies" / "entropies.zarr" / "zarr.json"
    attributes = json.loads(metadata.read_text())
    attributes["attributes"]["dpar"]["digest"] = "f" * 64
    metadata.write_text(json.dumps(attributes))
    with pytest.raises(ArtifactError, match="expected ffffffffffff: it belongs to another entropy store"):
        patch_report(inputs | {"entropy_map": tmp_path / "entropies"}, tmp_path / "report")
