"""What a text becomes in fields of each kind: the same value or an error, never another value."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as some
from pydantic import Field

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.train import NPPSettings
from conf.values import kind_at, scalar, value_of
from models.config import GPTSize

ODD = [
    *("010", "00", "-01", "1:30", "12:30:45", "0x10", "0o17", "0b1", "1_000", "+5", ".5", "5.", "1.e3", "1,000", "١"),
    *("yes", "no", "on", "off", "True", "TRUE", "y", "~", "Null", "none", "", " ", "NaN", "nan", "Infinity", "-inf"),
    *("inf", ".inf", "1e400", "-1e999", "9" * 400, "2026-11-26", "5 # five", "#5", "'5'", '"5"', "[5]", "5 5", "- 5"),
]


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize(("kind", "named"), [(int, "a whole number"), (float, "a decimal number"), (bool, "true or")])
def test_what_json_does_not_know_is_no_number_and_no_boolean(text: str, kind: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"expected {named}.*, found ") as caught:
        value_of(text, kind)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "text", [*ODD, "5", "1e3", "true", "null", "/data/base #2", " a b ", "[a, b]", "{a: 1}", "a: b"]
)
@pytest.mark.parametrize("kind", [str, Path, Literal["a", "b"], Annotated[str, Field(pattern="a")]])
def test_text_and_paths_are_taken_as_they_are(text: str, kind: Any) -> None:
    assert value_of(text, kind) == text


@pytest.mark.parametrize(
    "kind", [str | None, Path | None, Literal["a"] | None, int | None, tuple[int, int] | None, bool]
)
def test_null_is_null_where_the_field_may_take_it(kind: Any) -> None:
    assert value_of("null", kind) is None  # a section refuses it where its field does not


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("5", int, 5),
        (" 5\n", int, 5),
        ("-5", int, -5),
        ("9223372036854775808", int, 2**63),
        ("5", float, 5),
        ("1e3", float, 1000.0),
        ("1E-4", float, 1e-4),
        ("-0.5", float | None, -0.5),
        ("true", bool, True),
        ("false", bool | None, False),
        ("[0, 128]", tuple[int, int] | None, [0, 128]),
        ('["--exclusive", "a\\"b"]', tuple[str, ...], ["--exclusive", 'a"b']),
        ('{"a": {"b": [1.5, null]}}', dict[str, Any], {"a": {"b": [1.5, None]}}),
        ("B", GPTSize, "B"),
        ("1B", GPTSize, "1B"),
        ('{"dim": 64}', GPTSize, {"dim": 64}),
    ],
)
def test_json_is_read_as_json(text: str, kind: Any, value: Any) -> None:
    found = value_of(text, kind)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["1e3", "1.0", "5.0", "-0.0", "true"])
def test_a_whole_number_is_written_as_one(text: str) -> None:
    with pytest.raises(ValueError, match=f"expected a whole number such as 10, found '{text}'"):
        value_of(text, int)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a, b]", r"""strings in double quotes as in \["a", "b"\], found '\[a, b\]'"""),
        ("['a']", "double quotes"),
        ("[1, 2", "expected JSON"),
        ("[1, 2,]", "expected JSON"),
        ("[1] # two", "Extra data"),
        ("[NaN]", "NaN is no number"),
        ("[1e999]", "1e999 is too large"),
        ("[010]", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("0,128", r"a list in JSON, e\.g\. \[1, 2\]"),
        ("- 1", "a list in JSON"),
        ('{"a": 1}', "a list in JSON"),
        ("5", "a list in JSON"),
    ],
)
def test_a_list_that_is_not_json_is_one_helpful_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        value_of(text, tuple[int, int])
    assert len(str(caught.value)) < 250


def test_an_object_names_each_field_once() -> None:
    with pytest.raises(ValueError, match="a is given twice"):
        value_of('{"a": 1, "a": 2}', dict[str, int])


@given(some.integers(-(10**40), 10**40))
def test_every_integer_means_itself(number: int) -> None:
    assert scalar(str(number)) == number


@given(some.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_float_means_itself(number: float) -> None:
    assert value_of(repr(number), float) == number


@given(some.text())
def test_any_text_is_itself_or_the_number_that_it_spells(text: str) -> None:
    value = scalar(text)
    assert value is text or text in ("null", "true", "false") or value == float(text)


@pytest.mark.parametrize(
    ("section", "address", "kind"),
    [
        (Settings, "seed", int),
        (Settings, "dataset.root", Path | None),
        (Settings, "tokenizer.model.channels", int),
        (Settings, "train.training.steps", int),
        (Settings, "train.nothing", None),
        (Settings, "nowhere.at.all", None),
        (NPPSettings, "npp.levels", int),
        (NPPSettings, "model.num_layers", int),
        (RuntimeConfig, "compile", bool | None),
        (RuntimeConfig, "slurm.hours", float | None),
        (RuntimeConfig, "prefect_port.more", None),
    ],
)
def test_a_field_is_found_by_its_address(section: Any, address: str, kind: Any) -> None:
    found = kind_at(section, address.split("."))
    if kind is None:
        assert found is None
    else:
        other = {"": "never", "5": 5, "true": True, "0.5": 0.5}
        assert [_read(text, found) for text in other] == [_read(text, kind) for text in other]


def _read(text: str, kind: Any) -> Any:
    try:
        return value_of(text, kind)
    except ValueError:
        return ValueError
