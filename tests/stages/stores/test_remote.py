"""Stores on S3, of a server in this process: the same blocks, damage named, single rows refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import obstore
import pytest
import zarr
from moto.server import ThreadedMotoServer
from obstore.store import S3Store
from toy_facts import token_facts
from zarr.storage import ObjectStore

from stages.runtime.errors import ArtifactError, InputError
from stages.stores import remote
from stages.stores.tokens import TokenStore, token_writer

N, A, T, ROWS, V = 11, 2, 16, 4, 50
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (N, A, T)).astype(np.uint16)
LABELS = RNG.integers(0, 3, N).astype(np.uint16)
FACTS = token_facts(num_images=N, num_views=A, num_tokens=T, chunk_rows=ROWS, codebook_size=V)
ADDRESS = "s3://bucket/runs/tokens.zarr"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """A bucket with a copy of a finished store."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }.items():
        monkeypatch.setenv(name, value)
    import boto3

    boto3.client("s3", endpoint_url=server).create_bucket(Bucket="bucket")
    writer = token_writer(tmp_path / "tokens.zarr", FACTS)
    for unit in writer.pending():
        rows = writer.spec.rows(unit)
        writer.write(unit, tokens=TOKENS[rows], labels=LABELS[rows])
    writer.finish()
    store = S3Store.from_url(ADDRESS)
    for file in (tmp_path / "tokens.zarr").rglob("*"):
        if file.is_file():
            obstore.put(store, file.relative_to(tmp_path / "tokens.zarr").as_posix(), file.read_bytes())
    return store


def test_blocks_and_labels_are_those_of_the_local_store(bucket: S3Store, tmp_path: Path) -> None:
    local, distant = TokenStore.open(tmp_path / "tokens.zarr"), TokenStore.open(ADDRESS)
    assert (distant.facts, distant.digest) == (local.facts, local.digest)
    assert np.array_equal(distant.labels, LABELS)
    for unit in range(local.num_units):
        for view in range(A):
            assert np.array_equal(distant.read_block(unit, view), local.read_block(unit, view))
            assert not distant.read_block(unit, view).flags.writeable


def test_zarr_reads_the_same_objects(bucket: S3Store) -> None:
    group = zarr.open_group(ObjectStore(bucket, read_only=True), mode="r")
    assert np.array_equal(group["tokens"][:], TOKENS)


def test_a_block_read_again_is_not_fetched_again_and_few_are_kept(
    bucket: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TokenStore.open(ADDRESS)
    fetched: list[str] = []
    original = obstore.get
    monkeypatch.setattr(remote.obstore, "get", lambda store, key: fetched.append(key) or original(store, key))
    places = [(unit, view) for unit in range(store.num_units) for view in range(A)]
    for unit, view in [*places, *places[-remote.BLOCKS_KEPT :]]:
        store.read_block(unit, view)
    assert len(fetched) == len(places) > remote.BLOCKS_KEPT
    store.read_block(*places[0])
    assert len(fetched) == len(places) + 1


def test_single_rows_are_refused(bucket: S3Store) -> None:
    with pytest.raises(InputError, match=r"single rows of s3://bucket/runs/tokens\.zarr cannot be read.* local disk"):
        TokenStore.open(ADDRESS).fetch(np.array([1]), np.array([0]))


def test_damage_is_named_by_array_chunk_and_address(bucket: S3Store) -> None:
    key = "tokens/c/1/1/0"
    data = obstore.get(bucket, key).bytes().to_bytes()
    where = rf"array tokens, chunk 1/1/0 of tokens\.zarr \(file {ADDRESS}/{key}\)"
    store = TokenStore.open(ADDRESS)
    obstore.put(bucket, key, bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ArtifactError, match=f"{where} is damaged, its checksum"):
        store.read_block(1, 1)
    obstore.put(bucket, key, data[:-7])
    with pytest.raises(ArtifactError, match=f"{where} is 125 bytes long, expected 132"):
        TokenStore.open(ADDRESS)
    obstore.delete(bucket, key)
    with pytest.raises(ArtifactError, match=f"{where} cannot be read"):
        store.read_block(1, 1)
    with pytest.raises(ArtifactError, match=f"{where} is missing"):
        TokenStore.open(ADDRESS)


def test_a_bucket_or_store_that_is_not_there_is_named(bucket: S3Store) -> None:
    with pytest.raises(InputError, match=r"s3://nowhere/tokens\.zarr cannot be listed"):
        TokenStore.open("s3://nowhere/tokens.zarr")
    with pytest.raises(ArtifactError, match=r"s3://bucket/other\.zarr/zarr\.json is missing or damaged"):
        TokenStore.open("s3://bucket/other.zarr")
