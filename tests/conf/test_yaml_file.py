"""YAML files mean what they say, or are one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.load import CONF_DIR
from conf.yaml_file import read_yaml


def read(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "preset.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


ODD = ["010", "1:30", "yes", "off", "Yes", "0x10", "1_000", "~", ".inf", ".nan", "2026-11-26", ".5", "+1", "1e400", "="]


@pytest.mark.parametrize("text", ODD)
def test_what_json_does_not_know_stays_text(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, f"a: {text}\nb: [{text}]") == {"a": text, "b": [text]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("5", 5), ("-5", -5), ("1e-4", 1e-4), ("1.0e-3", 1e-3), ("true", True), ("null", None), ("", None)),
        *(("'5'", "5"), ('"true"', "true"), ("'null'", "null"), ('""', ""), ("a b # c", "a b"), ("{x: 1}", {"x": 1})),
    ],
)
def test_plain_scalars_of_json_are_values_and_quoted_ones_are_text(text: str, value: Any, tmp_path: Path) -> None:
    found = read(tmp_path, f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", r"preset\.yaml, line 3: a is set twice"),
        ("a:\n  x: 1\n  x: 1", r"line 3: x is set twice"),
        ("a: &x {b: 1}\nc: *x", r"line 1: an anchor is used again"),
        ("a: &x [*x]", "an anchor is used again"),
        (
            "a: !!python/object/apply:os.system [ls]",
            r"the tag tag:yaml\.org,2002:python/object/apply:os\.system is set",
        ),
        ('a: !!int "3"', "the tag .*int is set"),
        ("[a]: 1", "a name is a list or a mapping"),
        ("a: [1", "is not YAML"),
        ("a: 1\n--- \nb: 2", "is not YAML"),
        ("a: \x07", "is not YAML"),
        ("- a", r"holds \['a'\], expected sections"),
        ("5", "holds 5, expected sections"),
    ],
)
def test_what_is_read_twice_or_otherwise_elsewhere_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "preset.yaml" in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=r"preset\.yaml is not YAML"):
        read_yaml(tmp_path / "preset.yaml")


def test_a_merge_key_is_a_name_like_others(tmp_path: Path) -> None:
    assert read(tmp_path, "<<: {a: 1}") == {"<<": {"a": 1}}  # no section has it


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "# only a comment\n") == {}


@pytest.mark.parametrize("path", sorted(CONF_DIR.rglob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_files_mean_the_same_to_every_reader_of_yaml(path: Path) -> None:
    assert read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8"))
