"""The view of every stage: its numbers by hand, its bytes twice, and what is drawn when inputs are missing."""

from __future__ import annotations

import importlib
import inspect
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.section import Section
from models.config import GPTConfig
from models.gpt import GPT
from pipeline.graph import STAGES
from stages.runtime.artifact import read_json, write_json
from stages.stores.entropies import EntropyStore, entropy_writer
from stages.stores.patches import PatchIndex
from stages.stores.samples import SampleStore
from stages.stores.tokens import TokenStore, token_writer
from stages.weights.own import save_model

Run = Callable[[str, Section, dict[str, Path]], Path]
T, GRID, V, TRAIN, HELDOUT = 64, 8, 64, 36, 9
FILES = {
    "dataset": [],
    "tokenizer": [],
    "tokenize": [],
    "entropy_model": ["heldout_by_position.png"],
    "entropy_map": [],
    "patch_index": ["histograms.png", "patches.png"],
    "train": ["heldout_by_position.png"],
    "entropy_head": ["sources.png"],
    "sample": ["grid.png"],
    "evaluate": ["scores.json"],
}
ORANGE, BLUE = (255, 127, 14), (31, 119, 180)  # matplotlib's tab:orange and tab:blue


def numbers(view: Path) -> dict[str, float]:
    found: dict[str, float] = read_json(view / "metrics.json")
    return found


def content(view: Path) -> dict[str, bytes]:
    return {path.relative_to(view).as_posix(): path.read_bytes() for path in view.rglob("*") if path.is_file()}


def image_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        return picture.size


def has_colour(path: Path, colour: tuple[int, int, int]) -> bool:
    with Image.open(path) as picture:
        return bool((np.asarray(picture.convert("RGB")) == colour).all(axis=-1).any())


def starts_by_hand(entropies: np.ndarray, threshold: float) -> np.ndarray:
    """Algorithm 1 with at most four tokens in a patch and a patch at each row's start, one token at a time."""
    starts = np.zeros(entropies.shape, dtype=bool)
    for row, said in enumerate(entropies):
        length = 0
        for place, entropy in enumerate(said):
            opens = place < 2 or place % GRID == 0 or length == 4 or entropy > np.float32(threshold)
            starts[row, place] = opens
            length = 1 if opens else length + 1
    return starts


@pytest.fixture(scope="module")
def settings(tiny_settings: Settings) -> Settings:
    """Without the ladder, whose distances take long and are held against others in test_evaluate.py."""
    return tiny_settings.model_copy(update={"evaluate": tiny_settings.evaluate.model_copy(update={"ladder": False})})


@pytest.fixture(scope="module")
def artifacts(settings: Settings, tiny_artifacts: dict[str, Path], run_in_process: Run) -> dict[str, Path]:
    """Of all stages."""
    return tiny_artifacts | {"evaluate": run_in_process("evaluate", settings.evaluate, tiny_artifacts)}


@pytest.fixture(scope="module")
def views(settings: Settings, artifacts: dict[str, Path], draw_view: Run) -> dict[str, Path]:
    """The views of all stages."""
    return {name: draw_view(name, getattr(settings, name), artifacts) for name in STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_view_that_is_called_like_it(name: str) -> None:
    stage, view = (
        getattr(importlib.import_module(module), function)
        for module, function in (STAGES[name].entry, STAGES[name].view_entry)
    )
    assert inspect.signature(view) == inspect.signature(stage)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_the_same_artifact_gives_the_same_bytes(
    name: str, views: dict[str, Path], artifacts: dict[str, Path], settings: Settings, draw_view: Run
) -> None:
    again = content(draw_view(name, getattr(settings, name), artifacts))
    assert again == content(views[name])
    assert sorted(again) == sorted(["metrics.json", *FILES[name]])


@pytest.mark.parametrize("name", STAGES)
def test_metrics_are_flat_numbers(name: str, views: dict[str, Path]) -> None:
    found = numbers(views[name])
    assert found
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in found.values())


def test_the_patch_index_and_the_codes_are_counted(views: dict[str, Path], artifacts: dict[str, Path]) -> None:
    store = TokenStore.open(artifacts["tokenize"] / "tokens.zarr")
    index = PatchIndex.open(artifacts["patch_index"] / "patches.parquet", store.digest)
    images, of_view = np.arange(TRAIN + HELDOUT).repeat(2), np.tile(np.arange(2), TRAIN + HELDOUT)
    patches = [int(starts.sum()) for starts in index.starts(images, of_view)]
    train, heldout = sum(patches[: 2 * TRAIN]), sum(patches[2 * TRAIN :])
    found = numbers(views["patch_index"])
    assert found["mean_length"] == pytest.approx(2 * TRAIN * T / train, rel=1e-9)
    assert found["heldout_mean_length"] == pytest.approx(2 * HELDOUT * T / heldout, rel=1e-9)
    assert found["patches_per_image"] == pytest.approx(train / (2 * TRAIN), rel=1e-9)
    counts = Counter(store.fetch(images, of_view).ravel().tolist())
    shares = [count / counts.total() for count in counts.values()]
    found = numbers(views["tokenize"])
    assert found["codebook_usage"] == len(counts) / V
    assert found["unigram_entropy"] == pytest.approx(-sum(share * math.log(share) for share in shares), rel=1e-9)


def test_the_sources_are_held_against_the_entropy_model(views: dict[str, Path], artifacts: dict[str, Path]) -> None:
    store = TokenStore.open(artifacts["tokenize"] / "tokens.zarr")
    index = PatchIndex.open(artifacts["patch_index"] / "patches.parquet", store.digest)
    rows = np.arange(TRAIN, TRAIN + HELDOUT)
    wanted = EntropyStore.open(artifacts["entropy_map"] / "entropies.zarr").fetch(rows, 0 * rows)
    thresholds, found = read_json(artifacts["entropy_head"] / "thresholds.json"), numbers(views["entropy_head"])
    assert len(found) == 8
    for source in ("entropy_head", "own_entropy"):
        with (
            np.load(artifacts["entropy_head"] / "entropies.npz") as calibrated,
            np.load(artifacts["entropy_head"] / "heldout.npz") as heldout,
        ):
            on_training, said = calibrated[source], heldout[source]
        assert found[f"{source}_threshold"] == thresholds[source]
        patches = starts_by_hand(on_training, thresholds[source]).sum()
        assert found[f"{source}_mean_length"] == pytest.approx(on_training.size / patches, rel=1e-9)
        one, two = (values[:, 1:].astype(np.float64).ravel() for values in (said, wanted))
        one, two = one - one.mean(), two - two.mean()
        correlation = (one * two).sum() / math.sqrt((one**2).sum() * (two**2).sum())
        assert found[f"{source}_correlation"] == pytest.approx(correlation, rel=1e-9)
        same = starts_by_hand(said, thresholds[source]) == index.starts(rows, 0 * rows)
        assert found[f"{source}_agreement"] == pytest.approx(same.sum() / same.size, rel=1e-9)
        assert 0 < found[f"{source}_agreement"] < 1


def test_the_entropy_model_is_held_against_counting(views: dict[str, Path], artifacts: dict[str, Path]) -> None:
    store = TokenStore.open(artifacts["tokenize"] / "tokens.zarr")
    tokens = store.fetch(np.arange(TRAIN + HELDOUT), np.zeros(TRAIN + HELDOUT, dtype=np.int64))
    losses = []
    for smoothing in (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0):
        total = 0.0
        for place in range(1, T):  # the first token is no prediction of a model without classes
            seen = Counter(tokens[:TRAIN, place].tolist())
            shares = [(seen[token] + smoothing) / (TRAIN + smoothing * V) for token in tokens[TRAIN:, place].tolist()]
            total -= sum(map(math.log, shares))
        losses.append(total / (HELDOUT * (T - 1)))
    found = numbers(views["entropy_model"])
    assert found["unigram_loss"] == pytest.approx(min(losses), rel=1e-9)
    assert set(found) == {"heldout_loss", "unigram_loss"}


@pytest.mark.parametrize("name", STAGES)
def test_without_images_the_rest_is_drawn(
    name: str, views: dict[str, Path], artifacts: dict[str, Path], settings: Settings, tmp_path: Path
) -> None:
    module, function = STAGES[name].view_entry
    draw = getattr(importlib.import_module(module), function)
    draw(getattr(settings, name), artifacts, tmp_path, RuntimeConfig(device="cpu", threads=2))
    wanted = content(views[name])
    wanted.pop("patches.png", None)  # of real images
    assert content(tmp_path) == wanted


@pytest.fixture(scope="module")
def without_heldout(
    artifacts: dict[str, Path], settings: Settings, run_in_process: Run, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same tokens and entropies, as if every image were for training, and what follows from them."""
    folder = tmp_path_factory.mktemp("without-heldout")
    rows = np.arange(TRAIN + HELDOUT)
    tokens = TokenStore.open(artifacts["tokenize"] / "tokens.zarr")
    entropies = EntropyStore.open(artifacts["entropy_map"] / "entropies.zarr")
    writer = token_writer(folder / "tokenize" / "tokens.zarr", replace(tokens.facts, num_train=len(rows)))
    for unit in writer.pending():
        here = rows[writer.spec.rows(unit)]
        both = np.stack([tokens.fetch(here, np.full_like(here, view)) for view in range(2)], axis=1)
        writer.write(unit, tokens=both, labels=tokens.labels[here])
    facts = replace(entropies.facts, num_train=len(rows), tokens_digest=writer.finish())
    writer = entropy_writer(folder / "entropy_map" / "entropies.zarr", facts)
    for unit in writer.pending():
        here = rows[writer.spec.rows(unit)]
        both = np.stack([entropies.fetch(here, np.full_like(here, view)) for view in range(2)], axis=1)
        writer.write(unit, entropy=both)
    writer.finish()
    made = artifacts | {name: folder / name for name in ("tokenize", "entropy_map", "entropy_head")}
    made["patch_index"] = run_in_process("patch_index", settings.patch_index, made)
    shutil.copytree(artifacts["entropy_head"], made["entropy_head"])
    none = np.empty((0, T), np.float32)
    np.savez(made["entropy_head"] / "heldout.npz", entropy_head=none, own_entropy=none)
    return made


def test_without_heldout_images_training_views_are_shown(
    without_heldout: dict[str, Path], settings: Settings, draw_view: Run
) -> None:
    found = {
        name: draw_view(name, getattr(settings, name), without_heldout)
        for name in ("tokenize", "entropy_model", "entropy_map", "patch_index", "entropy_head")
    }
    assert set(numbers(found["entropy_head"])) == {
        f"{source}_{number}" for source in ("entropy_head", "own_entropy") for number in ("threshold", "mean_length")
    }
    # Two images, the first and the last training view, cut by the entropy model and by two sources.
    assert image_size(found["entropy_head"] / "sources.png") == (2 * (192 + 6) + 6, 3 * (192 + 13 + 12) + 6)
    assert set(numbers(found["patch_index"])) == {"mean_length", "patches_per_image", "threshold"}
    assert (found["patch_index"] / "patches.png").exists()
    assert set(numbers(found["entropy_map"])) == {"mean_entropy"}
    assert set(numbers(found["entropy_model"])) == {"heldout_loss"}
    assert numbers(found["tokenize"])["num_images"] == TRAIN + HELDOUT


def test_static_patches_have_no_entropies_to_show(
    views: dict[str, Path], artifacts: dict[str, Path], settings: Settings, run_in_process: Run, draw_view: Run
) -> None:
    fields = settings.patch_index.model_dump()
    fields |= {"mode": "static", "threshold": None, "target_mean_length": None, "static_length": 4.0}
    config = type(settings.patch_index).model_validate(fields)
    inputs = {name: artifacts[name] for name in ("dataset", "tokenize")}
    view = draw_view("patch_index", config, inputs | {"patch_index": run_in_process("patch_index", config, inputs)})
    assert numbers(view) == {"mean_length": 4.0, "heldout_mean_length": 4.0, "patches_per_image": 16.0}
    for path, panels in ((view, 1), (views["patch_index"], 2)):
        assert has_colour(path / "histograms.png", BLUE)
        assert has_colour(path / "histograms.png", ORANGE) == (panels == 2)
    assert image_size(view / "patches.png")[0] == 2 * (192 + 12) + 6, "no column and no scale of entropies"
    assert image_size(views["patch_index"] / "patches.png")[0] == 3 * (192 + 12) + 192 // 3 + 6


def test_a_model_without_patches_is_drawn_without_a_threshold(
    artifacts: dict[str, Path], settings: Settings, run_in_process: Run, draw_view: Run, tmp_path: Path
) -> None:
    shape = GPTConfig(dim=32, num_layers=1, num_heads=2, codebook_size=V, num_tokens=T, num_classes=3)
    save_model(tmp_path, "llamagen", GPT(shape), shape)
    config = settings.sample.model_copy(update={"boundaries": None})
    inputs = {"tokenizer": artifacts["tokenizer"], "tokenize": artifacts["tokenize"], "train": tmp_path}
    view = draw_view("sample", config, inputs | {"sample": run_in_process("sample", config, inputs)})
    assert numbers(view) == {"num_samples": 12, "sample_mean_patch_length": 1.0}
    assert image_size(view / "grid.png")[1] == 3 * (3 * 32 + 6) + 6


@pytest.mark.parametrize("mapped", [True, False])
def test_the_entropy_models_threshold_is_counted_where_its_entropies_are_there(
    mapped: bool, artifacts: dict[str, Path], settings: Settings, draw_view: Run, tmp_path: Path
) -> None:
    shutil.copytree(artifacts["sample"], tmp_path / "sample")
    rule = read_json(tmp_path / "sample" / "boundaries.json") | {"source": "entropy_model", "threshold": 4.146}
    write_json(tmp_path / "sample" / "boundaries.json", rule)
    config = settings.sample.model_copy(update={"boundaries": "entropy_model"})
    inputs = {name: artifacts[name] for name in ("tokenize", "entropy_map")} | {"sample": tmp_path / "sample"}
    if not mapped:
        del inputs["entropy_map"]
    found = numbers(draw_view("sample", config, inputs))
    assert found["threshold"] == 4.146
    assert found["num_samples"] == len(SampleStore.open(tmp_path / "sample" / "samples.zarr"))
    if mapped:
        store = EntropyStore.open(artifacts["entropy_map"] / "entropies.zarr")
        rows = np.arange(TRAIN).repeat(2)
        above = store.fetch(rows, np.tile(np.arange(2), TRAIN))[:, 1:] > np.float32(4.146)
        assert found["share_above_threshold"] == pytest.approx(above.sum() / above.size, rel=1e-9)
    else:
        assert "share_above_threshold" not in found


def test_without_sources_there_is_nothing_to_draw(
    artifacts: dict[str, Path], settings: Settings, draw_view: Run, tmp_path: Path
) -> None:
    write_json(tmp_path / "thresholds.json", {})
    view = draw_view("entropy_head", settings.entropy_head, artifacts | {"entropy_head": tmp_path})
    assert content(view).keys() == {"metrics.json"}
    assert numbers(view) == {}


def test_without_the_tokenizer_sources_are_numbers_alone(
    views: dict[str, Path], artifacts: dict[str, Path], settings: Settings, draw_view: Run
) -> None:
    inputs = {name: path for name, path in artifacts.items() if name != "tokenizer"}
    view = draw_view("entropy_head", settings.entropy_head, inputs)
    assert content(view).keys() == {"metrics.json"}
    assert numbers(view) == numbers(views["entropy_head"])
