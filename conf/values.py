"""Values of settings that are written as text: `--set`, `DPAR_*` variables and plain scalars of YAML files.

The field decides how its text is read. Text and paths are taken as they are; `null` is null where the field takes it.
Everything else is JSON: `true` and `false`, decimal numbers, lists and objects. What JSON does not know (octal numbers,
times, `yes`, comments) is an error, so no value changes on the way.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

Kind = Any  # a type, or what typing builds from types

_WORDS: dict[str, Any] = {"null": None, "true": True, "false": False}
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?P<rest>(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)")
_BLANKS = " \t\n\r"  # those of JSON
_MOST_DIGITS = 300  # of a number
_SHOWN = 80  # characters of a value in a message
_EXPECTED: dict[Kind, str] = {
    bool: "true or false",
    int: "a whole number such as 10",
    float: "a decimal number such as 0.5 or 1e-4",
    tuple: 'a list in JSON, e.g. [1, 2] or ["a", "b"]',
    dict: 'an object in JSON, e.g. {"a": 1}',
}


def scalar(text: str) -> Any:
    """The value of a JSON number, `true`, `false` or `null`. Other text stays text, also a number that overflows."""
    if text in _WORDS:
        return _WORDS[text]
    number = _NUMBER.fullmatch(text)
    if number is None or len(text) > _MOST_DIGITS:
        return text
    if not number["rest"]:
        return int(text)
    value = float(text)
    return value if math.isfinite(value) else text


def value_of(text: str, kind: Kind) -> Any:
    """The value that a field of this kind gets from a text.

    Raises:
        ValueError: The text is no value of this kind.
    """
    kinds = list(_kinds(kind))
    if str in kinds or Path in kinds:
        return None if text == "null" and NoneType in kinds else text
    bare = text.strip(_BLANKS)
    wanted = [each for each in kinds if each in _EXPECTED]  # the others, sections and sizes of models, check themselves
    may_be_tree = not wanted or tuple in wanted or dict in wanted
    value = _tree(bare) if may_be_tree and bare.startswith(("[", "{")) else scalar(bare)
    if value is None or not wanted or any(_is(value, each) for each in wanted):
        return value
    expected = [_EXPECTED[each] for each in wanted] + ["null"] * (NoneType in kinds)
    raise ValueError(f"expected {' or '.join(expected)}, found {_shown(text)}")


def kind_at(kind: Kind, address: Sequence[str]) -> Kind | None:
    """The kind of the field at an address below a section, outermost name first; None if there is no such field."""
    for name in address:
        found = (_field(each, name) for each in _kinds(kind, whole=True))
        kind = next((each for each in found if each is not None), None)
    return kind


def _field(kind: Kind, name: str) -> Kind | None:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.model_fields[name].annotation if name in kind.model_fields else None
    if is_dataclass(kind):
        return get_type_hints(kind).get(name)
    origin: Any = get_origin(kind)
    return get_args(kind)[1] if origin is dict else None


def _kinds(kind: Kind, *, whole: bool = False) -> Iterator[Kind]:
    """The plain types among which a value of this kind is; `whole` leaves the arguments of dicts and tuples."""
    origin: Any = get_origin(kind)
    if origin is Annotated:
        yield from _kinds(get_args(kind)[0], whole=whole)
    elif origin in (Union, UnionType):
        for each in get_args(kind):
            yield from _kinds(each, whole=whole)
    elif origin is Literal:
        yield from {type(each) for each in get_args(kind)}
    else:
        yield kind if whole or origin is None else origin


def _is(value: Any, kind: Kind) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, list if kind is tuple else kind)


def _tree(text: str) -> Any:
    """A JSON list or object."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse, parse_float=_number)
    except (ValueError, RecursionError) as error:
        why = str(error).partition(":")[0]
        raise ValueError(
            f'expected JSON, with strings in double quotes as in ["a", "b"], found {_shown(text)}: {why}'
        ) from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = value
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
