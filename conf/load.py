"""Resolve settings: defaults <- base.yaml <- preset <- ablation <- `--set stage.field=value`, each checked.

A preset may extend another one. Its part `families` holds settings for one value of `train.family` each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from conf.environment import from_variables
from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.train import DEFAULT_FAMILY, FAMILIES, without_other_families
from conf.values import kind_at, value_of
from conf.yaml_file import read_yaml

CONF_DIR = Path(__file__).resolve().parent
_PLAIN_FIELDS = ("seed",)  # settings of no section
_SHOWN = 200  # characters of a value in a message
_Checked = TypeVar("_Checked", bound=BaseModel)


class SettingsError(ValueError):
    """A setting that cannot be used; the message is one clear line."""


class Override(NamedTuple):
    """One `stage.field=value`."""

    address: list[str]
    text: str


def load_settings(
    preset: str | None = None, ablation: str | None = None, overrides: Sequence[str] = ()
) -> tuple[Settings, RuntimeConfig]:
    """Settings and runtime settings of a run.

    Args:
        preset: Name of a file in conf/preset, without suffix.
        ablation: Name of a file in conf/ablation, applied over the preset.
        overrides: `stage.field=value` pairs or `seed=value`; `runtime.field=value` sets runtime settings. See
            `conf.values` for how values are read.

    Raises:
        SettingsError: Unknown name, unknown setting, wrong type, value out of range, or a contradiction.
    """
    start, change = _read(CONF_DIR / "base.yaml"), dict[str, Any]()
    if preset is not None:
        start = _merge(start, _read_preset(preset))
    if ablation is not None:
        change = _read(_named_file("ablation", ablation))
    given = [_parse_override(override) for override in overrides]
    family = _family(_merge(start, change), given)
    for override in given:
        change = _merge(change, _tree(override, family))
    tree = _merge(_for_family(start, family), change)
    runtime = _merge(_variables(), _section(tree, "runtime"))
    tree.pop("runtime", None)
    return _checked(Settings, tree), _checked(RuntimeConfig, runtime, "runtime")


def names(kind: str) -> list[str]:
    """Names of the presets (`kind` is "preset") or ablations there are."""
    return sorted(path.stem for path in (CONF_DIR / kind).glob("*.yaml"))


def describe(kind: str, name: str) -> str:
    """First comment line of a preset or ablation file: what it is for."""
    first = _named_file(kind, name).read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()


def _named_file(kind: str, name: str) -> Path:
    if name not in names(kind):
        raise SettingsError(f"{kind} is {name!r}, expected one of {', '.join(names(kind)) or 'none (there are none)'}")
    return CONF_DIR / kind / f"{name}.yaml"


def _read_preset(name: str, *extending: str) -> dict[str, Any]:
    """A preset over the one that it extends, if any. `extending` are the presets that extend it."""
    if name in extending:
        raise SettingsError(f"preset {' extends '.join([*extending, name])}, expected one that extends none at the end")
    tree = _read(_named_file("preset", name))
    extends = tree.pop("extends", None)
    return tree if extends is None else _merge(_read_preset(extends, *extending, name), tree)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _variables() -> dict[str, Any]:
    try:
        return from_variables(os.environ)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _section(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of a section; none if it is not there."""
    section = tree.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise SettingsError(f"{name} is {section!r}, expected settings by name")
    return section


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge; a value of `change` wins, sections are merged field by field."""
    merged = dict(base)
    for name, value in change.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _parse_override(text: str) -> Override:
    address, equals, value = text.partition("=")
    parts = address.strip().split(".")
    if not equals or not all(parts) or (len(parts) == 1 and parts[0] not in _PLAIN_FIELDS):
        raise SettingsError(
            f"override is {text!r}, expected stage.field=value or seed=value, e.g. patch_index.max_length=4"
        )
    return Override(parts, value)


def _tree(override: Override, family: str) -> dict[str, Any]:
    """An override as settings. Its text is read as its field says."""
    address, text = override
    try:
        tree = value_of(text, _kind(address, family))
    except ValueError as error:
        raise SettingsError(f"{'.'.join(address)}: {error}") from error
    for part in reversed(address):
        tree = {part: tree}
    return dict(tree)


def _kind(address: Sequence[str], family: str) -> Any:
    match address:
        case ["runtime", *inner]:
            return kind_at(RuntimeConfig, inner)
        case ["train", *inner] if family in FAMILIES:
            return kind_at(FAMILIES[family], inner)
    return kind_at(Settings, address)


def _family(tree: Mapping[str, Any], overrides: Sequence[Override] = ()) -> str:
    family = _section(tree, "train").get("family", DEFAULT_FAMILY)
    for address, text in overrides:
        if address == ["train", "family"]:
            family = text
    return str(family)


def _for_family(tree: dict[str, Any], family: str) -> dict[str, Any]:
    """A preset as it stands for a family: with its settings for this family, without those that only others have.

    An ablation or an override that gives such a setting is refused by the section: it would have no effect.
    """
    tree = dict(tree)
    families = _section(tree, "families")
    tree.pop("families", None)
    for name in families:
        if name not in FAMILIES:
            raise SettingsError(f"families has settings for {name}, expected one of {', '.join(FAMILIES)}")
    if family != _family(tree):
        tree["train"] = without_other_families(_section(tree, "train"), family)
    return _merge(tree, _section(families, family))


def _checked(kind: type[_Checked], tree: dict[str, Any], *outer: str) -> _Checked:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(_one_line(error, outer)) from error


def _one_line(error: ValidationError, outer: Sequence[str]) -> str:
    """The first problems as `address: message (found value)`, joined by semicolons."""
    lines = []
    for problem in error.errors()[:5]:
        address = ".".join(map(str, (*outer, *problem["loc"]))) or "settings"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown setting; `dpar config` lists those there are"
        elif problem["type"] != "value_error":
            message = f"{message}, found {_shown(problem['input'])}"
        lines.append(f"{address}: {message}")
    return "; ".join(lines)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
