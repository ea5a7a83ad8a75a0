"""`dpar verify --deep` finds and names damage in every file of every store and table; opening checks headers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from toy_facts import token_facts

from conf.runtime import RuntimeConfig
from pipeline.cache.manifest import Manifest, content_digest, key_of
from pipeline.cache.store import Cache
from pipeline.upkeep import verify
from stages.images.listing import Listing
from stages.runtime.artifact import read_json, write_json
from stages.runtime.errors import ArtifactError
from stages.stores.entropies import EntropyFacts, EntropyStore, entropy_writer
from stages.stores.image_index import FACTS, ImageIndex, write_index
from stages.stores.patches import PatchFacts, PatchIndex, write_patches
from stages.stores.samples import SampleFacts, SampleStore, sample_writer
from stages.stores.tokens import TokenStore, token_writer
from stages.stores.units import UnitWriter

N, A, T, ROWS, V = 11, 2, 64, 4, 500
RNG = np.random.default_rng(5)
SIZES: dict[str, Any] = {"num_images": N, "num_train": 8, "num_views": A, "num_tokens": T, "grid": 8}
TOKEN_FACTS = token_facts(**SIZES, chunk_rows=ROWS, codebook_size=V)


def write(writer: UnitWriter, **arrays: np.ndarray) -> str:
    for unit in writer.pending():
        writer.write(unit, **{name: values[writer.spec.rows(unit)] for name, values in arrays.items()})
    return writer.finish()


@dataclass(frozen=True)
class Home:
    """A cache with artifacts of every kind of store and table; `content` has the bytes of each file."""

    runtime: RuntimeConfig
    artifacts: dict[str, Path]
    content: dict[Path, bytes]

    def damages(self) -> list[str]:
        return [damage for finding in verify(self.runtime, deep=True) for damage in finding.damages]


def write_patches_file(path: Path, facts: PatchFacts) -> None:
    starts = RNG.random((N, A, T)) < 0.4
    starts[..., 0] = True
    bits = np.packbits(starts, axis=-1, bitorder="little")
    blocks = [bits[first : first + ROWS, view] for view in range(A) for first in range(0, N, ROWS)]
    write_patches(path, facts, blocks, rule={"threshold": "7.8"}, chunk_rows=ROWS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Home:
    runtime = RuntimeConfig(home=tmp_path_factory.mktemp("home"))
    cache = Cache(runtime.home)
    digests: dict[str, str] = {}
    artifacts: dict[str, Path] = {}

    def commit(stage: str, make: Callable[[Path], str], *inputs: str) -> str:
        parts = {"schema": 2, "stage": stage, "settings": {}, "code": [], "packages": {}, "external": None}
        parts["inputs"] = {name: digests[name] for name in inputs}
        work = next_work(cache, parts)
        made = make(work)
        manifest = cache.commit(parts, 0.0)
        digests[stage], artifacts[stage] = manifest.digest, cache.path(manifest.key)
        return made

    commit("dataset", make_index)
    tokens = RNG.integers(0, V, (N, A, T)).astype(np.uint16)
    labels = RNG.integers(1, 3, N).astype(np.uint16)
    tokens_digest = commit(
        "tokenize",
        lambda work: write(token_writer(work / "tokens.zarr", TOKEN_FACTS), tokens=tokens, labels=labels),
        "dataset",
    )
    facts = EntropyFacts(
        **SIZES,
        chunk_rows=ROWS,
        codebook_size=V,
        tokens_digest=tokens_digest,
        model_sha256="m" * 64,
        precision="float32",
    )
    entropy = RNG.uniform(1, 6, (N, A, T)).astype(np.float32)
    entropies_digest = commit(
        "entropy_map",
        lambda work: write(entropy_writer(work / "entropies.zarr", facts), entropy=entropy),
        "tokenize",
    )
    origin = PatchFacts(
        num_images=N, num_views=A, num_tokens=T, entropies_digest=entropies_digest, tokens_digest=tokens_digest
    )
    commit("patch_index", lambda work: str(write_patches_file(work / "patches.parquet", origin)), "entropy_map")
    commit("sample", make_samples, "tokenize")
    files = [file for path in artifacts.values() for file in sorted(path.rglob("*")) if file.is_file()]
    return Home(runtime, artifacts, {file: file.read_bytes() for file in files})


def next_work(cache: Cache, parts: dict[str, Any]) -> Path:
    work = cache.work(key_of(parts))
    work.mkdir(parents=True)
    return work


def make_index(work: Path) -> str:
    facts = np.zeros(N, FACTS)
    facts["bytes"], facts["width"], facts["height"] = RNG.integers(1, 1000, N), 40, 40
    facts["digest"] = np.frombuffer(RNG.bytes(16 * N), "V16")
    names = [f"{RNG.bytes(8).hex()}.png" for _ in range(N)]
    labels = RNG.integers(1, 3, N).astype(np.uint16)
    images = Listing(
        relpaths=np.array(names, np.dtypes.StringDType()),
        offsets=np.zeros(N, np.int64),
        sizes=facts["bytes"],
        labels=labels,
        classes=["a", "b", "c"],
        left_out={},
    )
    write_index(work, images=images, facts=facts, order=np.arange(N), num_train=8, source="folder")
    return ""


def make_samples(work: Path) -> str:
    facts = SampleFacts(
        num_samples=N, num_classes=3, num_tokens=T, grid=8, codebook_size=V, image_size=8, chunk_rows=ROWS
    )
    return write(
        sample_writer(work / "samples.zarr", facts),
        images=RNG.integers(1, 256, (N, 8, 8, 3)).astype(np.uint8),
        labels=RNG.integers(1, 3, N).astype(np.uint16),
        tokens=RNG.integers(1, V, (N, T)).astype(np.uint16),
        patch_starts=RNG.random((N, T)) < 0.5,
    )


@pytest.fixture
def home(whole: Home) -> Any:
    yield whole
    for file, data in whole.content.items():
        if not file.exists() or file.read_bytes() != data:
            file.write_bytes(data)


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


DAMAGES: dict[str, Callable[[bytes, int], bytes | None]] = {
    "a flipped bit": flip,
    "a zeroed page": lambda data, place: data[:place] + bytes(len(data[place : place + 16])) + data[place + 16 :],
    "cut by 7 bytes": lambda data, _: data[:-7],
    "cut in half": lambda data, _: data[: len(data) // 2],
    "empty": lambda _, __: b"",
    "missing": lambda _, __: None,
}
OF_SIZE = set(list(DAMAGES)[2:])


def damage(file: Path, data: bytes | None) -> None:
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)


ARRAYS = {
    ("tokenize", "tokens.zarr", "tokens"): "1/1/0",
    ("tokenize", "tokens.zarr", "labels"): "1",
    ("entropy_map", "entropies.zarr", "entropy"): "2/0/0",
    ("sample", "samples.zarr", "images"): "1/0/0/0",
    ("sample", "samples.zarr", "labels"): "0",
    ("sample", "samples.zarr", "tokens"): "2/0",
    ("sample", "samples.zarr", "patch_starts"): "1/0",
}
OPEN: dict[str, Callable[[Path], object]] = {
    "tokens.zarr": TokenStore.open,
    "entropies.zarr": EntropyStore.open,
    "samples.zarr": SampleStore.open,
}


def test_whole_artifacts_have_no_damage(home: Home) -> None:
    assert home.damages() == []
    assert len(verify(home.runtime, deep=True)) == len(home.artifacts) == 5


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("where", ARRAYS, ids="-".join)
def test_a_damaged_chunk_is_named_by_array_chunk_and_file(home: Home, where: tuple[str, str, str], kind: str) -> None:
    (stage, store, array), chunk = where, ARRAYS[where]
    file = home.artifacts[stage] / store / array / "c" / chunk
    damage(file, DAMAGES[kind](home.content[file], 2))
    (found,) = home.damages()
    assert found.startswith(f"array {array}, chunk {chunk} of {store} (file {file}) is ")
    if kind in OF_SIZE:
        with pytest.raises(ArtifactError) as raised:
            OPEN[store](home.artifacts[stage] / store)
        assert str(raised.value) == found
    else:
        assert "its checksum differs" in found


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_no_damage_to_any_file_goes_undetected(home: Home, kind: str) -> None:
    generator = np.random.default_rng(9)
    for file, data in home.content.items():
        if file.name == "manifest.json":
            continue
        damaged = DAMAGES[kind](data, int(generator.integers(max(1, len(data) - 16))))
        if damaged != data:
            damage(file, damaged)
            found = home.damages()
            file.write_bytes(data)
            assert any(file.name in line for line in found), file


@pytest.mark.parametrize("kind", sorted(OF_SIZE))
def test_an_artifact_without_a_readable_manifest_is_damaged(home: Home, kind: str) -> None:
    file = home.artifacts["tokenize"] / "manifest.json"
    damage(file, DAMAGES[kind](home.content[file], 0))
    (found,) = home.damages()
    assert found.startswith("manifest.json ")


def test_every_damaged_file_is_reported_once(home: Home) -> None:
    store = home.artifacts["tokenize"] / "tokens.zarr"
    for key in ("tokens/c/0/1/0", "tokens/c/2/0/0", "labels/c/1"):
        damage(store / key, flip(home.content[store / key], 3))
    (home.artifacts["sample"] / "samples.zarr/images/c/0/0/0/0").unlink()
    assert [line.split(" of ")[0] for line in home.damages()] == [
        "array labels, chunk 1",
        "array tokens, chunk 0/1/0",
        "array tokens, chunk 2/0/0",
        "array images, chunk 0/0/0/0",
    ]


def parquet_pages(path: Path) -> dict[tuple[str, int], int]:
    """An offset in the data of each column in each row group."""
    file = pq.ParquetFile(path)
    columns = {
        (column.path_in_schema, group): column.data_page_offset + column.total_compressed_size - 2
        for group in range(file.num_row_groups)
        for column in map(file.metadata.row_group(group).column, range(file.metadata.num_columns))
    }
    file.close()
    return columns


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "name"), [("patch_index", "patches.parquet"), ("dataset", "images.parquet")])
def test_a_damaged_table_is_named_by_column_and_row_group(home: Home, stage: str, name: str) -> None:
    path = home.artifacts[stage] / name
    for (column, group), place in parquet_pages(path).items():
        damage(path, flip(home.content[path], place))
        (found,) = home.damages()
        assert found.startswith(f"column {column}, row group {group} of {name} (file {path}) is damaged")
        if column in ("width", "height"):
            continue  # informational: no stage reads them
        with pytest.raises(ArtifactError, match=name):
            PatchIndex.open(path, "t" * 64) if stage == "patch_index" else ImageIndex.open(path.parent)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize(("stage", "name"), [("patch_index", "patches.parquet"), ("dataset", "images.parquet")])
def test_a_damaged_table_is_not_opened(home: Home, stage: str, name: str, kind: str) -> None:
    path = home.artifacts[stage] / name
    damage(path, DAMAGES[kind](home.content[path], max(parquet_pages(path).values()) - 20))
    assert any(name in line for line in home.damages())
    with pytest.raises(ArtifactError, match=name):
        PatchIndex.open(path, "t" * 64) if stage == "patch_index" else ImageIndex.open(path.parent)


def recommit(path: Path) -> None:
    """Update the manifest to the current files, as if the damage was done before the commit."""
    manifest = read_json(path / "manifest.json")
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = [len(data), hashlib.sha256(data).hexdigest()]
    del manifest["seal"]
    whole = Manifest(**manifest | {"digest": content_digest(manifest["files"])})
    write_json(path / "manifest.json", whole.sealed())


def test_damage_from_before_the_manifest_is_found_too(home: Home) -> None:
    store = home.artifacts["tokenize"] / "tokens.zarr"
    damage(store / "tokens/c/0/0/0", flip(home.content[store / "tokens/c/0/0/0"], 8))
    (store / "labels/zarr.json").write_text((store / "labels/zarr.json").read_text() + " ")
    recommit(home.artifacts["tokenize"])
    (found,) = home.damages()
    assert found.startswith("array tokens, chunk 0/0/0 of tokens.zarr")
    damage(store / "tokens/c/0/0/0", home.content[store / "tokens/c/0/0/0"])
    recommit(home.artifacts["tokenize"])
    (found,) = home.damages()
    assert "does not have the digest" in found


def test_entries_never_written_are_found_under_a_right_checksum(home: Home) -> None:
    import google_crc32c

    file = home.artifacts["entropy_map"] / "entropies.zarr/entropy/c/1/1/0"
    values = np.frombuffer(home.content[file][:-4], "<f4").copy()
    values[70] = np.nan
    damage(file, values.tobytes() + google_crc32c.value(values.tobytes()).to_bytes(4, "little"))
    recommit(home.artifacts["entropy_map"])
    (found,) = home.damages()
    assert found.startswith(f"array entropy, chunk 1/1/0 of entropies.zarr (file {file}) holds entries that were never")


def test_an_index_of_other_stores_than_its_artifact_was_made_from_is_found(home: Home) -> None:
    path = home.artifacts["patch_index"] / "patches.parquet"
    facts = PatchFacts(num_images=N, num_views=A, num_tokens=T, entropies_digest="e" * 64, tokens_digest="")
    write_patches_file(path, replace(facts, tokens_digest=TokenStore.open(store_of(home)).digest))
    recommit(home.artifacts["patch_index"])
    (found,) = home.damages()
    assert f"was made from entropies_digest {'e' * 64}, but the digest of" in found


def store_of(home: Home) -> Path:
    return home.artifacts["tokenize"] / "tokens.zarr"


def test_arrays_that_contradict_the_metadata_are_one_damage_each(home: Home) -> None:
    file = home.artifacts["entropy_map"] / "entropies.zarr/zarr.json"
    damage(file, home.content[file].replace(b'"num_images": 11', b'"num_images": 91'))
    found = home.damages()
    assert len(found) == 2
    assert "has shape [11, 2, 64], expected [91, 2, 64]" in " ".join(found)
