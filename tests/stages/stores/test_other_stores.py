from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from stages.stores.entropies import EntropyFacts, EntropyStore, entropy_writer
from stages.stores.samples import SampleFacts, SampleStore, sample_writer
from stages.stores.verify import artifact_damage

N, A, T, ROWS = 7, 2, 16, 3
RNG = np.random.default_rng(1)


def read_elsewhere(path: Path, name: str) -> list[np.ndarray]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
    return [zarr.open_group(str(path), mode="r")[name][:], tensorstore.open(spec).result().read().result()]


@pytest.fixture
def entropies(tmp_path: Path) -> tuple[Path, np.ndarray]:
    values = RNG.uniform(0, 9, (N, A, T)).astype(np.float32)
    facts = EntropyFacts(
        num_images=N,
        num_train=5,
        num_views=A,
        num_tokens=T,
        grid=4,
        chunk_rows=ROWS,
        codebook_size=100,
        tokens_digest="abc",
        model_sha256="def",
        precision="float32",
    )
    writer = entropy_writer(tmp_path / "entropies.zarr", facts)
    for unit in writer.pending():
        writer.write(unit, entropy=values[writer.spec.rows(unit)])
    writer.finish()
    return tmp_path / "entropies.zarr", values


def test_entropies_come_back_bit_for_bit(entropies: tuple[Path, np.ndarray]) -> None:
    path, values = entropies
    store = EntropyStore.open(path)
    images, views = RNG.integers(0, N, 20), RNG.integers(0, A, 20)
    assert np.array_equal(store.fetch(images, views), values[images, views])
    assert np.array_equal(store.read_block(2, 1), values[6:, 1])
    assert (store.tokens_digest, store.num_train, store.num_units) == ("abc", 5, 3)
    assert all(np.array_equal(found, values) for found in read_elsewhere(path, "entropy"))
    assert not list(artifact_damage(store.location.parent, []))


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "never written"), (np.inf, "non-finite"), (-np.inf, "non-finite")]
)
def test_non_finite_entropies_cannot_be_written(
    entropies: tuple[Path, np.ndarray], tmp_path: Path, value: float, said: str
) -> None:
    path, values = entropies
    writer = entropy_writer(tmp_path / "other" / "entropies.zarr", EntropyStore.open(path).facts)
    block = values[:ROWS].copy()
    block[0, 0, 7] = value
    with pytest.raises(ValueError, match=f"entropy of unit 0 holds .*{said}"):
        writer.write(0, entropy=block)


def test_samples_come_back_whole_and_in_blocks(tmp_path: Path) -> None:
    facts = SampleFacts(
        num_samples=N, num_classes=3, num_tokens=T, grid=4, codebook_size=100, image_size=8, chunk_rows=ROWS
    )
    arrays = {
        "images": RNG.integers(0, 256, (N, 8, 8, 3)).astype(np.uint8),
        "labels": RNG.integers(0, 3, N).astype(np.uint16),
        "tokens": RNG.integers(0, 100, (N, T)).astype(np.uint16),
        "patch_starts": RNG.random((N, T)) < 0.5,
    }
    writer = sample_writer(tmp_path / "samples.zarr", facts)
    for unit in writer.pending():
        writer.write(unit, **{name: values[writer.spec.rows(unit)] for name, values in arrays.items()})
    writer.finish()

    store = SampleStore.open(tmp_path / "samples.zarr")
    rows = np.array([6, 0, 3, 3])
    assert np.array_equal(store.images(rows), arrays["images"][rows])
    assert np.array_equal(np.concatenate(list(store.blocks())), arrays["images"])
    for name in ("labels", "tokens", "patch_starts"):
        assert np.array_equal(getattr(store, name), arrays[name])
    for name, values in arrays.items():
        assert all(np.array_equal(found, values) for found in read_elsewhere(store.location, name))
    assert not list(artifact_damage(store.location.parent, []))
