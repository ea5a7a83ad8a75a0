import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stages.patches.thresholds
from conf.patch_index import PatchIndexConfig
from conf.schema import RuntimeConfig
from stages.patch_index import patch_index
from stages.runtime.errors import ArtifactError, InputError
from stages.stores.entropies import EntropyFacts, entropy_writer
from stages.stores.patches import PatchIndex

N, A, GRID, V = 40, 2, 8, 512
T, TRAIN = GRID * GRID, 30
ENTROPIES = np.random.default_rng(3).uniform(0, np.log(V), (N, A, T)).astype(np.float32)
ENTROPIES[TRAIN:] *= 0.5  # held-out images are less surprising


@pytest.fixture(scope="module")
def entropy_map(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("entropy_map"), ENTROPIES, chunk_rows=16)


def write_store(folder: Path, entropies: np.ndarray, chunk_rows: int) -> Path:
    facts = EntropyFacts(
        num_images=len(entropies),
        num_train=len(entropies) * TRAIN // N,
        num_views=A,
        num_tokens=T,
        grid=GRID,
        chunk_rows=chunk_rows,
        codebook_size=V,
        tokens_digest="t" * 64,
        model_sha256="m" * 64,
        precision="float32",
    )
    writer = entropy_writer(folder / "entropies.zarr", facts)
    for unit in writer.pending():
        writer.write(unit, entropy=entropies[writer.spec.rows(unit)])
    writer.finish()
    return folder


def run(entropy_map: Path, output: Path, **settings: object) -> np.ndarray:
    output.mkdir(exist_ok=True)
    patch_index(PatchIndexConfig(**settings), {"entropy_map": entropy_map}, output, RuntimeConfig())
    index = PatchIndex.open(output / "patches.parquet", "t" * 64)
    return index.starts(np.arange(N).repeat(A), np.tile(np.arange(A), N)).reshape(N, A, T)


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
    entropy_map: Path, tmp_path: Path, max_length: int | None, row_boundary: bool
) -> None:
    starts = run(entropy_map, tmp_path, threshold=4.5, max_length=max_length, row_boundary=row_boundary)
    for image in range(N):
        for view in range(A):
            wanted = algorithm_1(ENTROPIES[image, view], 4.5, max_length, row_boundary)
            assert starts[image, view].tolist() == wanted


def test_the_rule_and_its_numbers_are_written(entropy_map: Path, tmp_path: Path) -> None:
    starts = run(entropy_map, tmp_path, threshold=4.3, max_length=4)
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
    metrics = read(tmp_path, "metrics.json")
    assert metrics["mean_length"] == mean
    assert metrics["patches_per_image"] == pytest.approx(T / mean)
    assert metrics["heldout_mean_length"] == T * (N - TRAIN) * A / starts[TRAIN:].sum()
    assert metrics["heldout_mean_length"] > metrics["mean_length"]


def test_an_entropy_equal_to_the_threshold_opens_no_patch(entropy_map: Path, tmp_path: Path) -> None:
    place = (3, 1, 21)
    at = float(ENTROPIES[place])
    below = float(np.nextafter(ENTROPIES[place], np.float32(0)))
    options = {"max_length": None, "row_boundary": False}
    assert not run(entropy_map, tmp_path, threshold=at, **options)[place]
    assert run(entropy_map, tmp_path, threshold=below, **options)[place]


@pytest.mark.parametrize("target", [1.2, 1.8191, 2.5])
def test_the_threshold_found_gives_the_mean_length_wanted(entropy_map: Path, tmp_path: Path, target: float) -> None:
    starts = run(entropy_map, tmp_path, target_mean_length=target)
    reached = T * TRAIN * A / starts[:TRAIN].sum()
    one_patch = reached / starts[:TRAIN].sum()  # what a single patch more or less changes
    assert abs(reached - target) <= one_patch
    assert read(tmp_path, "rule.json")["mean_length"] == reached
    again = run(entropy_map, tmp_path / "again", threshold=read(tmp_path, "rule.json")["threshold"])
    assert np.array_equal(again, starts)


def test_the_search_looks_at_an_even_share_of_many_views(
    entropy_map: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.patches.thresholds, "SAMPLE_ROWS", 20)
    starts = run(entropy_map, tmp_path, target_mean_length=2.0)
    assert T * TRAIN * A / starts[:TRAIN].sum() == pytest.approx(2.0, rel=0.05)


def test_a_mean_length_out_of_reach_is_refused(entropy_map: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"target_mean_length is 3\.9, expected 1\.\d+ to 3\.\d+"):
        run(entropy_map, tmp_path, target_mean_length=3.9)


@pytest.mark.parametrize("length", [1.0, 2.0, 1.8191])
def test_static_patches_are_the_same_for_every_image(entropy_map: Path, tmp_path: Path, length: float) -> None:
    starts = run(entropy_map, tmp_path, mode="static", static_length=length)
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
    assert "threshold" not in read(tmp_path, "metrics.json")


def test_the_same_settings_make_the_same_bytes(entropy_map: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(entropy_map, tmp_path / name, threshold=4.5)
    for file in ("patches.parquet", "rule.json", "metrics.json", "histograms.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    with Image.open(tmp_path / "one" / "histograms.png") as picture:
        assert picture.size[0] >= 800


def test_incomplete_entropies_are_refused(entropy_map: Path, tmp_path: Path) -> None:
    (tmp_path / "entropies.zarr").mkdir()
    with pytest.raises(ArtifactError, match=r"entropies\.zarr/zarr\.json is missing"):
        run(tmp_path, tmp_path / "out", threshold=4.5)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.patches.thresholds, "SAMPLE_ROWS", 100)
    peaks = []
    for images in (2000, 2000, 20_000):  # the first run is not counted: it loads fonts and the like
        folder = write_store(tmp_path / f"{len(peaks)}", np.resize(ENTROPIES, (images, A, T)), chunk_rows=500)
        tracemalloc.start()
        patch_index(PatchIndexConfig(threshold=4.5), {"entropy_map": folder}, folder, RuntimeConfig())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1]
