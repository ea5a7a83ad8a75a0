"""Manifests are validated before their contents are used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.cache.manifest import (
    Manifest,
    ManifestError,
    content_digest,
    key_of,
    parse_manifest,
    read_manifest,
    stage_of,
)
from pipeline.upkeep import verify

if TYPE_CHECKING:
    from conftest import Tiny

PARTS = {"schema": 2, "stage": "alpha", "settings": {}, "code": [], "inputs": {}, "packages": {}, "external": None}
FILES = {"number.json": [1, "0" * 64], "store.zarr/a/c/0": [5, "a" * 64]}


def manifest(**changes: Any) -> Manifest:
    """A valid manifest with changed fields; key and digest are computed from them."""
    given = {"parts": PARTS, "files": FILES, "definitions": {}, "created": 1.5, "duration_s": 2, "stage": "alpha"}
    given |= changes
    made = {"key": key_of(given["parts"]), "digest": content_digest(given["files"])}
    return Manifest(**made | given)


def problem(content: Any, key: str | None = None) -> str:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(content, key or key_of(PARTS))
    return str(caught.value)


def test_a_sealed_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = manifest(definitions={"stages.alpha:alpha": "0f"}, environment={"python": "3.11"}, accepted="because")
    folder = tmp_path / written.key
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(written.sealed()))
    assert read_manifest(folder) == written
    folder.rename(tmp_path / "alpha-00000000000000000000")
    with pytest.raises(ManifestError, match="the folder is alpha-0000"):
        read_manifest(tmp_path / "alpha-00000000000000000000")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../other", "a/../b", "a//b", "./a", "", "a\0b", "..\\b", "c:\\b", "manifest.json", "a/"]
)
def test_a_file_name_leads_nowhere_else(name: str) -> None:
    assert problem(manifest(files={name: [1, "0" * 64]}).sealed()) == "manifest.json: field files is not valid"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("files", {"a": [1]}),
        ("files", {"a": [-1, "0" * 64]}),
        ("files", {"a": [True, "0" * 64]}),
        ("files", {"a": [1.0, "0" * 64]}),
        ("files", {"a": [1, "0" * 63]}),
        ("files", {"a": [1, "A" * 64]}),
        ("files", [["a", 1]]),
        ("parts", PARTS | {"code": {}}),
        ("parts", PARTS | {"inputs": {"beta": "short"}}),
        ("parts", PARTS | {"more": 1}),
        ("parts", {name: value for name, value in PARTS.items() if name != "packages"}),
        ("created", "today"),
        ("created", float("nan")),
        ("duration_s", -1),
        ("definitions", {"a": 1}),
        ("accepted", 3),
        ("environment", None),
        ("digest", None),
    ],
)
def test_a_field_of_another_type_is_refused(field: str, value: Any) -> None:
    assert problem(manifest().sealed() | {field: value}) == f"manifest.json: field {field} is not valid"


def test_a_manifest_of_something_else_is_refused() -> None:
    whole = manifest().sealed()
    assert parse_manifest(dict(whole), key_of(PARTS)) == manifest()
    assert "key does not match parts" in problem(whole | {"parts": PARTS | {"settings": {"value": 2}}})
    assert "key does not match parts" in problem(whole | {"parts": PARTS | {"stage": "beta"}})
    assert "digest does not match files" in problem(whole | {"files": {}})
    assert "its seal does not match" in problem(whole | {"created": 1.25})
    assert "its seal does not match" in problem(whole | {"accepted": "forged"})
    assert problem(whole | {"odd": 1}) == "manifest.json has missing or unknown fields: odd"
    assert problem([whole]) == "manifest.json does not hold a JSON object"
    del whole["seal"]
    assert problem(whole | {"parts": PARTS | {"schema": 1}}) == (
        "manifest.json has schema 1, expected 2: written by another version"
    )
    assert problem(whole) == "manifest.json has missing or unknown fields: seal"


def test_keys_name_their_stage() -> None:
    assert stage_of("entropy_map-0123456789abcdef0123") == "entropy_map"
    for other in ("train", "train-pictures", "train-0123456789ABCDEF0123", "-0123456789abcdef0123", "../x-" + "0" * 20):
        assert stage_of(other) is None


@pytest.mark.slow
def test_every_flipped_digit_is_found(tiny: Tiny) -> None:
    path = tiny.run("alpha").path / "manifest.json"
    text = path.read_text()
    for place, character in enumerate(text):
        if character.isdigit():
            path.write_text(text[:place] + str((int(character) + 1) % 10) + text[place + 1 :])
            (finding,) = verify(tiny.runtime, project=tiny.project)
            assert len(finding.damages) == 1
            assert tiny.cache.lookup(path.parent.name) is None
    path.write_text(text)
    assert [finding.damages for finding in verify(tiny.runtime, project=tiny.project)] == [[]]


@pytest.mark.slow
def test_one_broken_manifest_hides_no_other(tiny: Tiny) -> None:
    tiny.run_all(beta=5)
    tiny.run_all()
    broken = tiny.run("beta", beta=5).path
    for text in ("", "{", "[]", "null", '{"files": 3}', "[" * 100_000, "\ud800", '{"key": NaN}'):
        (broken / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
        assert tiny.plan(beta=5)["beta"].state == "stale"
        assert tiny.plan(beta=5)["beta"].reason.startswith("manifest.json ")
        assert [status.state for status in tiny.plan().values()] == ["cached"] * 3
        found = {finding.path: finding.damages for finding in verify(tiny.runtime, project=tiny.project)}
        assert [path for path, damages in found.items() if damages] == [broken]
        assert len(found) == 5  # one artifact of alpha, two of beta and two of gamma
    assert tiny.run("beta", beta=5).state == "ran"


@pytest.mark.slow
def test_a_manifest_that_is_no_file_is_not_opened(tiny: Tiny) -> None:
    path = tiny.run("alpha").path
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")  # opening a FIFO would block until there is a writer
    assert tiny.cache.read(path) is None
    (finding,) = verify(tiny.runtime, project=tiny.project)
    assert finding.damages == ["manifest.json is not a regular file"]
