"""Batches of the loader: a function of the step alone, whatever the processes, kills and packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.patch_tables import pack_bits
from stages.runtime.distributed import World
from stages.runtime.prefetch import prefetch
from stages.stores.patches import PatchFacts, PatchIndex, write_patches
from stages.stores.tokens import TokenFacts, TokenStore, token_writer
from stages.training.patched import PatchedBatch, PatchedData
from stages.training.stream import Part, SampleStream, share_of

N, TRAIN, A, GRID, V = 45, 37, 3, 4, 512
T, GLOBAL = GRID * GRID, 16
CPU = torch.device("cpu")
RNG = np.random.default_rng(4)
TOKENS = RNG.integers(0, V, (N, A, T)).astype(np.uint16)
LABELS = RNG.integers(0, 5, N).astype(np.uint16)
STARTS = RNG.random((N, A, T)) < 0.5
STARTS[..., 0] = True


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PatchedData:
    folder = tmp_path_factory.mktemp("data")
    facts = TokenFacts(
        num_images=N,
        num_train=TRAIN,
        num_classes=5,
        num_views=A,
        num_tokens=T,
        grid=GRID,
        chunk_rows=8,
        codebook_size=V,
        image_size=64,
        views="ten_crop",
        view_names=[str(view) for view in range(A)],
        vq_sha256="v" * 64,
    )
    writer = token_writer(folder / "tokens.zarr", facts)
    for unit in writer.pending():
        rows = writer.spec.rows(unit)
        writer.write(unit, tokens=TOKENS[rows], labels=LABELS[rows])
    digest = writer.finish()
    made_from = PatchFacts(num_images=N, num_views=A, num_tokens=T, entropies_digest="e" * 64, tokens_digest=digest)
    blocks = [pack_bits(STARTS[:, view]) for view in range(A)]
    write_patches(folder / "patches.parquet", made_from, blocks, rule={}, chunk_rows=N)
    return PatchedData(TokenStore.open(folder / "tokens.zarr"), PatchIndex.open(folder / "patches.parquet", digest))


def global_batch(data: PatchedData, step: int, size: int) -> list[np.ndarray]:
    """Tokens, labels and patch lengths of one step, over all processes."""
    stream = SampleStream(TRAIN, GLOBAL, seed=7)
    shares = [share_of(GLOBAL, World(rank, size, CPU)) for rank in range(size)]
    ranks = [data.training_batch(stream, step, share, CPU) for share in shares]
    columns = [(b.tokens, b.labels, b.patches.first, b.patches.last, b.patches.number) for b in ranks]
    return [torch.cat(column).numpy() for column in zip(*columns, strict=True)]


def test_the_number_of_processes_changes_no_global_batch(data: PatchedData) -> None:
    for step in range(8):  # three epochs and a half
        alone = global_batch(data, step, 1)
        for size in (2, 8):
            for found, wanted in zip(global_batch(data, step, size), alone, strict=True):
                assert np.array_equal(found, wanted)


def test_an_epoch_holds_every_training_image_once_each_in_its_view_with_its_patches(data: PatchedData) -> None:
    stream = SampleStream(TRAIN, GLOBAL, seed=7)
    batches = [data.training_batch(stream, step, Part(0, GLOBAL), CPU) for step in range(2 * TRAIN)]
    tokens = np.concatenate([batch.tokens.numpy() for batch in batches])
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    image_of = {TOKENS[image, view].tobytes(): (image, view) for image in range(N) for view in range(A)}
    found = np.array([image_of[row.astype(np.uint16).tobytes()] for row in tokens])
    assert np.array_equal(LABELS[found[:, 0]], labels)
    for epoch in range(2 * GLOBAL):
        assert sorted(found[epoch * TRAIN : (epoch + 1) * TRAIN, 0]) == list(range(TRAIN))
    assert {(image, view) for image, view in found} == {(image, view) for image in range(TRAIN) for view in range(A)}
    counts = np.concatenate([np.array(batch.patches.global_lengths) - 1 for batch in batches])
    assert np.array_equal(counts, STARTS[found[:, 0], found[:, 1], :-1].sum(axis=1))


def test_a_run_that_goes_on_in_the_middle_of_an_epoch_sees_what_it_would_have_seen(data: PatchedData) -> None:
    stream = SampleStream(TRAIN, GLOBAL, seed=7)

    def make(step: int) -> PatchedBatch:
        return data.training_batch(stream, step, Part(0, GLOBAL), CPU)

    with prefetch(make, range(12), threads=1, depth=1) as batches:
        whole = [batch.tokens for batch in batches]
    with prefetch(make, range(5, 12), threads=1, depth=1) as batches:
        resumed = [batch.tokens for batch in batches]
    assert len(resumed) == 7
    assert all(torch.equal(one, other) for one, other in zip(resumed, whole[5:], strict=True))


def test_the_state_is_the_seed_the_samples_seen_and_the_digests(data: PatchedData) -> None:
    state = SampleStream(TRAIN, GLOBAL, seed=7).state(5) | data.digests
    assert state == {
        "seed": 7,
        "num_images": TRAIN,
        "samples_seen": 5 * GLOBAL,
        "tokens": data.store.digest,
        "patches": data.index.digest,
    }


def test_every_tensor_for_a_gpu_is_pinned_and_none_for_the_cpu(
    data: PatchedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    stream = SampleStream(TRAIN, GLOBAL, seed=7)
    data.training_batch(stream, 0, Part(0, GLOBAL), CPU)
    assert pinned == []
    batch = data.training_batch(stream, 0, Part(0, GLOBAL), torch.device("cuda", 0))
    tensors = [batch.tokens, batch.labels, *(v for v in vars(batch.patches).values() if isinstance(v, Tensor))]
    assert len(pinned) == len(tensors) == 9
    assert {id(tensor) for tensor in pinned} == {id(tensor) for tensor in tensors}
