import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import stages.patches.thresholds
import stages.views.patch_index
from conf.patch_index import PatchIndexConfig
from conf.runtime import RuntimeConfig
from stages.patch_index import patch_index
from stages.runtime.errors import ArtifactError, InputError
from stages.stores.entropies import EntropyFacts, entropy_writer
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenFacts, TokenStore, token_writer
from stages.views.patch_index import patch_index as draw_view

N, A, GRID, V = 40, 2, 8, 512
T, TRAIN = GRID * GRID, 30
ENTROPIES = np.random.default_rng(3).uniform(0, np.log(V), (N, A, T)).astype(np.float32)
ENTROPIES[TRAIN:] *= 0.5  # held-out images are less surprising


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens.zarr, and entropies.zarr of those tokens."""
    return write_stores(tmp_path_factory.mktemp("stores"), ENTROPIES, chunk_rows=16)


def write_stores(folder: Path, entropies: np.ndarray, chunk_rows: int) -> Path:
    shape = {
        "num_images": len(entropies),
        "num_train": len(entropies) * TRAIN // N,
        "num_views": A,
        "num_tokens": T,
        "grid": GRID,
        "chunk_rows": chunk_rows,
        "codebook_size": V,
    }
    made = {"num_classes": 1, "image_size": 64, "views": "flip", "view_names": ["center", "mirrored/center"]}
    tokens = token_writer(folder / "tokens.zarr", TokenFacts(**shape, **made, vq_sha256="v" * 64))
    for unit in tokens.pending():
        rows = tokens.spec.count_rows([unit])
        tokens.write(unit, tokens=np.zeros((rows, A, T), np.uint16), labels=np.zeros(rows, np.uint16))
    facts = EntropyFacts(**shape, tokens_digest=tokens.finish(), model_sha256="m" * 64, precision="float32")
    writer = entropy_writer(folder / "entropies.zarr", facts)
    for unit in writer.pending():
        writer.write(unit, entropy=entropies[writer.spec.rows(unit)])
    writer.finish()
    return folder


def inputs(stores: Path, config: PatchIndexConfig) -> dict[str, Path]:
    """What the stage reads."""
    return {"tokenize" if config.mode == "static" else "entropy_map": stores}


def run(stores: Path, output: Path, **settings: object) -> np.ndarray:
    """Patch starts (N, A, T) of an index in `output`."""
    output.mkdir(exist_ok=True)
    config = PatchIndexConfig(**settings)
    patch_index(config, inputs(stores, config), output, RuntimeConfig())
    index = PatchIndex.open(output / "patches.parquet", TokenStore.open(stores / "tokens.zarr").digest)
    return index.starts(np.arange(N).repeat(A), np.tile(np.arange(A), N)).reshape(N, A, T)


def view(stores: Path, artifact: Path, **settings: object) -> Path:
    """The view of an index, without images."""
    config, output = PatchIndexConfig(**settings), artifact / "views"
    output.mkdir()
    read = inputs(stores, config) | {"tokenize": stores, "patch_index": artifact}
    draw_view(config, read, output, RuntimeConfig())
    return output


def read(output: Path, name: str) -> dict[str, float]:
    return json.loads((output / name).read_text())


def algorithm_1(entropies: np.ndarray, threshold: float, max_length: int | None, row_boundary: bool) -> list[bool]:
    """The paper's loop, one token at a time."""
    starts, length = [], 0
    for place, entropy in enumerate(entropies):
        opens = place < 2 or entropy > np.float32(threshold) or length == max_length
        opens = opens or (row_boundary and place % GRID == 0)
        starts.append(bool(opens))
        length = 1 if opens else length + 1
    return starts


@pytest.mark.parametrize("max_length", [1, 3, 4, None])
@pytest.mark.parametrize("row_boundary", [True, False])
def test_starts_are_those_of_algorithm_1(
    stores: Path, tmp_path: Path, max_length: int | None, row_boundary: bool
) -> None:
    starts = run(stores, tmp_path, threshold=4.5, max_length=max_length, row_boundary=row_boundary)
    for image in range(N):
        for view in range(A):
            wanted = algorithm_1(ENTROPIES[image, view], 4.5, max_length, row_boundary)
            assert starts[image, view].tolist() == wanted


def test_the_rule_and_its_numbers_are_written(stores: Path, tmp_path: Path) -> None:
    settings = {"threshold": 4.3, "max_length": 4}
    starts = run(stores, tmp_path, **settings)
    mean = T * TRAIN * A / starts[:TRAIN].sum()
    assert read(tmp_path, "rule.json") == {
        "mode": "entropy",
        "threshold": float(np.float32(4.3)),
        "threshold_hex": float(np.float32(4.3)).hex(),
        "max_length": 4,
        "row_boundary": True,
        "static_length": None,
        "mean_length": mean,
    }
    metrics = read(view(stores, tmp_path, **settings), "metrics.json")
    assert metrics == {
        "mean_length": pytest.approx(mean, rel=1e-12),
        "patches_per_image": pytest.approx(starts[:TRAIN].sum() / (TRAIN * A), rel=1e-12),
        "heldout_mean_length": pytest.approx(T * (N - TRAIN) * A / starts[TRAIN:].sum(), rel=1e-12),
        "threshold": float(np.float32(4.3)),
    }
    assert metrics["heldout_mean_length"] > metrics["mean_length"]


def test_an_entropy_equal_to_the_threshold_opens_no_patch(stores: Path, tmp_path: Path) -> None:
    place = (3, 1, 21)
    at = float(ENTROPIES[place])
    below = float(np.nextafter(ENTROPIES[place], np.float32(0)))
    options = {"max_length": None, "row_boundary": False}
    assert not run(stores, tmp_path, threshold=at, **options)[place]
    assert run(stores, tmp_path, threshold=below, **options)[place]


@pytest.mark.parametrize("target", [1.2, 1.8191, 2.5])
def test_the_threshold_found_gives_the_mean_length_wanted(stores: Path, tmp_path: Path, target: float) -> None:
    starts = run(stores, tmp_path, target_mean_length=target)
    reached = T * TRAIN * A / starts[:TRAIN].sum()
    one_patch = reached / starts[:TRAIN].sum()  # what a single patch more or less changes
    assert abs(reached - target) <= one_patch
    assert read(tmp_path, "rule.json")["mean_length"] == reached
    again = run(stores, tmp_path / "again", threshold=read(tmp_path, "rule.json")["threshold"])
    assert np.array_equal(again, starts)


def test_the_search_looks_at_an_even_share_of_many_views(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.patches.thresholds, "SAMPLE_ROWS", 20)
    starts = run(stores, tmp_path, target_mean_length=2.0)
    assert T * TRAIN * A / starts[:TRAIN].sum() == pytest.approx(2.0, rel=0.05)


def test_a_mean_length_out_of_reach_is_refused(stores: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"target_mean_length is 3\.9, expected 1\.\d+ to 3\.\d+"):
        run(stores, tmp_path, target_mean_length=3.9)


@pytest.mark.parametrize("length", [1.0, 2.0, 1.8191])
def test_static_patches_are_the_same_for_every_image(stores: Path, tmp_path: Path, length: float) -> None:
    settings = {"mode": "static", "static_length": length}
    starts = run(stores, tmp_path, **settings)
    patch_of = np.floor(np.arange(T) / length)
    wanted = np.diff(patch_of, prepend=-1) > 0
    assert np.array_equal(starts, np.broadcast_to(wanted, starts.shape))
    rule = read(tmp_path, "rule.json")
    assert (rule["mode"], rule["static_length"], rule["threshold"], rule["max_length"]) == (
        "static",
        length,
        None,
        None,
    )
    assert read(view(stores, tmp_path, **settings), "metrics.json") == {
        name: pytest.approx(T / wanted.sum() if "length" in name else wanted.sum(), rel=1e-12)
        for name in ("mean_length", "heldout_mean_length", "patches_per_image")
    }


def test_the_same_settings_make_the_same_bytes(stores: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(stores, tmp_path / name, threshold=4.5)
        view(stores, tmp_path / name, threshold=4.5)
    files = ("patches.parquet", "rule.json", "views/metrics.json", "views/histograms.png")
    made = [{path.relative_to(folder).as_posix() for path in folder.rglob("*.*")} for folder in tmp_path.iterdir()]
    assert made == [{*files, "record/progress.json"}] * 2
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_incomplete_entropies_are_refused(stores: Path, tmp_path: Path) -> None:
    (tmp_path / "entropies.zarr").mkdir()
    with pytest.raises(ArtifactError, match=r"entropies\.zarr/zarr\.json is missing"):
        run(tmp_path, tmp_path / "out", threshold=4.5)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.patches.thresholds, "SAMPLE_ROWS", 100)
    peaks = []
    for images in (2000, 2000, 20_000):  # the first run is not counted: it loads what is loaded once
        folder = write_stores(tmp_path / f"{len(peaks)}", np.resize(ENTROPIES, (images, A, T)), chunk_rows=500)
        tracemalloc.start()
        patch_index(PatchIndexConfig(threshold=4.5), {"entropy_map": folder}, folder, RuntimeConfig())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1]


@pytest.mark.slow
def test_memory_of_the_view_grows_by_the_index_alone(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.views.patch_index, "_BLOCK", 1000)
    run(stores, tmp_path / "small", threshold=4.5)
    view(stores, tmp_path / "small", threshold=4.5)  # loads fonts and the like
    peaks = []
    for images in (2000, 20_000):
        folder = write_stores(tmp_path / f"{len(peaks)}", np.resize(ENTROPIES, (images, A, T)), chunk_rows=500)
        patch_index(PatchIndexConfig(threshold=4.5), {"entropy_map": folder}, folder, RuntimeConfig())
        tracemalloc.start()
        view(folder, folder, threshold=4.5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 18_000 * A * 3 * T // 8
