"""What a killed attempt left may be damaged in any file: the next attempt ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy_facts import token_facts

from stages.stores import units
from stages.stores.tokens import TokenStore, token_writer
from stages.stores.units import UnitWriter
from stages.stores.verify import artifact_damage

N, A, T, ROWS, V = 11, 2, 16, 4, 50
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (N, A, T)).astype(np.uint16)
LABELS = RNG.integers(0, 3, N).astype(np.uint16)
FACTS = token_facts(num_images=N, num_views=A, num_tokens=T, chunk_rows=ROWS, codebook_size=V)


def write(writer: UnitWriter, units: list[int]) -> None:
    for unit in units:
        rows = writer.spec.rows(unit)
        writer.write(unit, tokens=TOKENS[rows], labels=LABELS[rows])


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    writer = token_writer(folder / "tokens.zarr", FACTS)
    write(writer, writer.pending())
    writer.finish()
    return content(folder)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an attempt left that was killed after two of three units."""
    folder = tmp_path_factory.mktemp("left")
    write(token_writer(folder / "tokens.zarr", FACTS), [0, 2])
    return folder


@pytest.fixture
def work(left: Path, tmp_path: Path) -> Path:
    shutil.copytree(left, tmp_path / "work")
    return tmp_path / "work"


def resume(work: Path) -> list[int]:
    """Go on after a kill; the units that were written."""
    writer = token_writer(work / "tokens.zarr", FACTS)
    pending = writer.pending()
    write(writer, pending)
    writer.finish()
    return pending


FILES = {  # with the units that an attempt must write again
    "tokens.zarr/zarr.json": [],
    "tokens.zarr/tokens/zarr.json": [],
    "tokens.zarr/labels/zarr.json": [],
    "tokens.zarr/tokens/c/0/1/0": [0],
    "tokens.zarr/tokens/c/2/0/0": [2],
    "tokens.zarr/labels/c/2": [2],
    "record/units/tokens-000000.json": [0],
    "record/units/tokens-000002.json": [2],
}
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "cut": lambda data: data[:-7],
    "grown": lambda data: data + b"}",
    "zeros": lambda data: bytes(len(data)),
    "not UTF-8": lambda data: b"\xff" + data[1:],
    "an object": lambda data: b"{}",
    "a list": lambda data: b"[1, 2]",
    "a number": lambda data: b"7",
    "nested": lambda data: b'{"attributes": [1], "store": 0, "unit": [], "chunks": {"a": 1}}',
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_made_again_with_a_warning(
    work: Path, undisturbed: dict[str, bytes], caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    data = DAMAGES[damage]((work / file).read_bytes())
    (work / file).unlink() if data is None else (work / file).write_bytes(data)
    assert resume(work) == sorted([1, *FILES[file]])
    assert content(work) == undisturbed
    warnings = [record.getMessage() for record in caplog.records if record.name == units.__name__]
    if damage == "missing" and not file.startswith("tokens.zarr/tokens/c") and file != "tokens.zarr/labels/c/2":
        assert warnings == []  # as in a folder that no attempt has reached
    else:
        assert len(warnings) == 1
        assert str(work / file) in warnings[0]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_never_taken_as_done(work: Path, undisturbed: dict[str, bytes], file: str) -> None:
    whole = (work / file).read_bytes()
    tried = 0
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        shutil.rmtree(work)
        work.mkdir()
        for key, data in undisturbed.items():
            (work / key).parent.mkdir(parents=True, exist_ok=True)
            (work / key).write_bytes(data)
        (work / file).write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << int(RNG.integers(7))]) + whole[place + 1 :]
        )
        resume(work)
        assert content(work) == undisturbed, place
        tried += 1
    assert tried >= 40 or tried == len(whole)


def test_a_finished_store_with_a_damaged_file_heals_too(work: Path, undisturbed: dict[str, bytes]) -> None:
    resume(work)
    for file in FILES:
        whole = (work / file).read_bytes()
        (work / file).write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    assert resume(work) == [0, 2]
    assert content(work) == undisturbed
    assert not list(artifact_damage(work, []))


def test_files_are_compared_once_per_process(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[int] = []
    original = units._describe
    monkeypatch.setattr(units, "_describe", lambda data: described.append(len(data)) or original(data))
    writer = token_writer(work / "tokens.zarr", FACTS)
    assert writer.pending() == writer.pending() == [1]
    assert len(described) == 2 * (A + 1)
    write(writer, [1])
    writer.finish()
    assert len(described) == 3 * (A + 1)  # and once as it was written


def test_every_rank_compares_its_own_units(work: Path) -> None:
    chunk = work / "tokens.zarr/tokens/c/2/1/0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    writers = [token_writer(work / "tokens.zarr", FACTS) for _ in range(2)]
    assert [writer.pending(rank, 2) for rank, writer in enumerate(writers)] == [[2], [1]]


def test_a_manifest_names_its_store_and_its_files(work: Path) -> None:
    """Two units with their manifests swapped, and one of another layout, count as not written."""
    first, third = (work / f"record/units/tokens-00000{unit}.json" for unit in (0, 2))
    one, two = first.read_bytes(), third.read_bytes()
    assert json.loads(one)["store"] == json.loads(two)["store"]
    first.write_bytes(two)
    third.write_bytes(one)
    assert token_writer(work / "tokens.zarr", FACTS).pending() == [0, 1, 2]


def test_what_another_store_left_beyond_this_one_is_removed(
    work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from dataclasses import replace

    fewer = replace(FACTS, num_images=2 * ROWS)
    alone = token_writer(tmp_path / "alone/tokens.zarr", fewer)
    after = token_writer(work / "tokens.zarr", fewer)
    for writer in (alone, after):
        write(writer, [0, 1])
        writer.finish()
    assert content(after.path) == content(alone.path)
    assert f"{work}/tokens.zarr/labels/c/2 is not part of the store: removed" in caplog.text
    assert np.array_equal(TokenStore.open(after.path).labels, LABELS[: 2 * ROWS])
