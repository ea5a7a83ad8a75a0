import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from toy_facts import token_facts

from stages.runtime.errors import ArtifactError
from stages.stores.tokens import TokenFacts, TokenStore, token_writer
from stages.stores.units import UnitWriter
from stages.stores.verify import artifact_damage

N, A, T, ROWS, V = 11, 2, 16, 4, 50
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (N, A, T)).astype(np.uint16)
LABELS = RNG.integers(0, 3, N).astype(np.uint16)


def facts(**changes: object) -> TokenFacts:
    sizes = {"num_images": N, "num_views": A, "num_tokens": T, "chunk_rows": ROWS, "codebook_size": V}
    return token_facts(**sizes | changes)


def write(writer: UnitWriter, units: list[int]) -> None:
    for unit in units:
        rows = writer.spec.rows(unit)
        writer.write(unit, tokens=TOKENS[rows], labels=LABELS[rows])


def finished(folder: Path) -> Path:
    writer = token_writer(folder / "tokens.zarr", facts())
    write(writer, writer.pending())
    writer.finish()
    return folder / "tokens.zarr"


def content(store: Path) -> dict[str, bytes]:
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return finished(tmp_path)


def test_zarr_and_tensorstore_read_what_was_written(store: Path) -> None:
    group = zarr.open_group(str(store), mode="r")
    assert np.array_equal(group["tokens"][:], TOKENS)
    assert np.array_equal(group["labels"][:], LABELS)
    for name, wanted in (("tokens", TOKENS), ("labels", LABELS)):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / name)}}
        assert np.array_equal(tensorstore.open(spec).result().read().result(), wanted)


def test_fetch_gives_rows_in_the_order_asked_for(store: Path) -> None:
    tokens = TokenStore.open(store)
    images, views = RNG.integers(0, N, 40), RNG.integers(0, A, 40)
    assert np.array_equal(tokens.fetch(images, views), TOKENS[images, views])
    assert tokens.fetch(images, views).dtype == np.uint16
    assert tokens.fetch(images[:0], views[:0]).shape == (0, T)
    assert np.array_equal(tokens.labels, LABELS)
    assert [len(tokens.read_block(unit, 1)) for unit in range(tokens.num_units)] == [4, 4, 3]
    assert np.array_equal(tokens.read_block(2, 1), TOKENS[8:, 1])


@pytest.mark.parametrize(("image", "view"), [(N, 0), (-1, 0), (0, A), (0, -1)])
def test_fetch_refuses_what_the_store_does_not_have(store: Path, image: int, view: int) -> None:
    with pytest.raises(IndexError, match="of tokens, expected 0"):
        TokenStore.open(store).fetch(np.array([0, image]), np.array([0, view]))


def test_facts_come_back(store: Path) -> None:
    tokens = TokenStore.open(store)
    assert tokens.facts == facts()
    assert (len(tokens), tokens.num_train, tokens.num_tokens, tokens.grid, tokens.codebook_size) == (N, 8, T, 4, V)


def test_the_bytes_do_not_depend_on_order_or_number_of_processes(tmp_path: Path, store: Path) -> None:
    path = tmp_path / "other" / "tokens.zarr"
    writers = [token_writer(path, facts()) for _ in range(2)]
    for rank in (1, 0):
        write(writers[rank], writers[rank].pending(rank, 2)[::-1])
    writers[0].finish()
    assert content(path) == content(store)


def test_a_killed_attempt_is_continued_to_the_same_bytes(tmp_path: Path, store: Path) -> None:
    path = tmp_path / "killed" / "tokens.zarr"
    write(token_writer(path, facts()), [0, 2])
    manifests = path.parent / "record" / "units"
    (manifests / "tokens-000002.json").unlink()  # killed between the last chunk and the manifest
    (path / "tokens" / "c" / "1" / "0").mkdir(parents=True)
    (path / "tokens" / "c" / "1" / "0" / ".0.4711.partial").write_bytes(b"half a chunk")
    before = (path / "tokens" / "c" / "0" / "0" / "0").stat().st_mtime_ns

    writer = token_writer(path, facts())
    assert writer.pending() == [1, 2]
    write(writer, writer.pending())
    assert writer.pending() == []
    writer.finish()
    assert content(path) == content(store)
    assert (path / "tokens" / "c" / "0" / "0" / "0").stat().st_mtime_ns == before


def test_a_unit_whose_chunk_went_is_written_again(tmp_path: Path, store: Path) -> None:
    (store / "tokens" / "c" / "1" / "1" / "0").unlink()
    assert token_writer(store, facts()).pending() == [1]


def test_finishing_again_changes_nothing(store: Path) -> None:
    before = content(store)
    assert token_writer(store, facts()).finish() == TokenStore.open(store).digest
    assert content(store) == before


def test_a_store_lacking_a_unit_cannot_be_finished(tmp_path: Path) -> None:
    writer = token_writer(tmp_path / "tokens.zarr", facts())
    write(writer, [0, 2])
    with pytest.raises(ArtifactError, match="lacks unit 1 of 3"):
        writer.finish()
    with pytest.raises(ArtifactError, match="complete=False"):
        TokenStore.open(tmp_path / "tokens.zarr")


def test_units_of_another_store_are_not_mixed_in(tmp_path: Path, store: Path) -> None:
    """The same folder, then other metadata, or fewer images: as if only the second store had been written."""
    for number, change in enumerate(({"vq_sha256": "1" * 64}, {"num_images": N - 4, "num_train": 5})):
        writer = token_writer(store, facts(**change))
        units = list(range(writer.spec.num_units))
        assert writer.pending() == units
        with pytest.raises(ArtifactError, match="complete=False"):
            TokenStore.open(store)
        alone = token_writer(tmp_path / str(number) / "tokens.zarr", facts(**change))
        for one in (writer, alone):
            write(one, units)
        assert writer.finish() == alone.finish()
        assert content(store) == content(alone.path)


def test_writes_that_are_not_one_whole_unit_are_refused(tmp_path: Path) -> None:
    writer = token_writer(tmp_path / "tokens.zarr", facts())
    good = {"tokens": TOKENS[:4], "labels": LABELS[:4]}
    bad = [
        good | {"tokens": TOKENS[:3]},
        good | {"tokens": TOKENS[:5]},
        good | {"tokens": TOKENS[:4, :1]},
        good | {"tokens": TOKENS[:4].astype(np.int64)},
        {"tokens": TOKENS[:4]},
    ]
    for blocks in bad:
        with pytest.raises(ValueError, match="unit 0"):
            writer.write(0, **blocks)
    for unit in (-1, 3):
        with pytest.raises(ValueError, match=rf"unit {unit} of tokens\.zarr, expected 0\.\.2"):
            writer.write(unit, **good)
    marked = TOKENS[:4].copy()
    marked[1, 1, 3] = 65535
    with pytest.raises(ValueError, match=r"tokens of unit 0 holds entries that were never written \(65535\)"):
        writer.write(0, tokens=marked, labels=LABELS[:4])
    for name, bound in (("tokens", V), ("labels", 3)):
        outside = {name: np.where(good[name] == good[name].max(), bound, good[name]).astype(np.uint16)}
        with pytest.raises(ValueError, match=f"{name} of unit 0 holds {bound}, expected values below {bound}"):
            writer.write(0, **good | outside)
    assert writer.pending() == [0, 1, 2]


def test_a_unit_is_written_once(store: Path) -> None:
    before = content(store)
    with pytest.raises(ValueError, match=r"unit 1 of tokens\.zarr is written already"):
        token_writer(store, facts()).write(1, tokens=TOKENS[:4], labels=LABELS[:4])
    assert content(store) == before


def test_a_disk_that_loses_bytes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = token_writer(tmp_path / "tokens.zarr", facts())
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: original(self)[:-1] + b"?")
    with pytest.raises(ArtifactError, match="does not read back"):
        write(writer, [0])
    monkeypatch.undo()
    assert writer.pending() == [0, 1, 2]


CHUNK = "tokens/c/1/1/0"


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


AT_OPEN = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut by 7 bytes": lambda path: cut(path, 7),
    "cut in half": lambda path: cut(path, path.stat().st_size // 2),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"x"),
}


@pytest.mark.parametrize("damage", AT_OPEN)
def test_a_chunk_of_the_wrong_size_is_named_when_the_store_is_opened(store: Path, damage: str) -> None:
    AT_OPEN[damage](store / CHUNK)
    with pytest.raises(ArtifactError, match=rf"array tokens, chunk 1/1/0 of tokens\.zarr \(file .*{CHUNK}\) is "):
        TokenStore.open(store)


def test_chunks_that_changed_places_are_found_when_verified(store: Path, tmp_path: Path) -> None:
    shutil.move(store / CHUNK, tmp_path / "aside")
    shutil.move(store / "tokens/c/0/0/0", store / CHUNK)
    shutil.move(tmp_path / "aside", store / "tokens/c/0/0/0")
    (damage,) = artifact_damage(store.parent, [])
    assert "does not have the digest" in damage.what


@pytest.mark.parametrize("file", ["zarr.json", "tokens/zarr.json"])
@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"attributes": [1], "shape": 1, "chunk_grid": 0}', '{"a'])
def test_damaged_metadata_is_named(store: Path, file: str, text: str | None) -> None:
    (store / file).unlink() if text is None else (store / file).write_text(text)
    with pytest.raises(ArtifactError, match=f"{file} is missing or damaged|has format None"):
        TokenStore.open(store)


@pytest.mark.parametrize(("field", "value"), [("shape", [N, A, 2 * T]), ("data_type", "int16"), ("codecs", [])])
def test_another_layout_is_refused(store: Path, field: str, value: object) -> None:
    path = store / "tokens" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ArtifactError, match=f"has {field} "):
        TokenStore.open(store)


def test_another_kind_of_store_is_refused(store: Path) -> None:
    path = store / "zarr.json"
    metadata = json.loads(path.read_text())
    del metadata["attributes"]["dpar"]["codebook_size"]
    path.write_text(json.dumps(metadata))
    with pytest.raises(ArtifactError, match="other attributes than its kind of store"):
        TokenStore.open(store)
