"""Resolve settings: defaults <- base.yaml <- preset <- ablation <- `--set stage.field=value`, each checked.

A preset may extend another one. Its part `families` holds settings for one value of `train.family` each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.train import DEFAULT_FAMILY, FAMILIES, without_other_families

CONF_DIR = Path(__file__).resolve().parent
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C takes a tenth of the time
_PLAIN_FIELDS = ("seed",)  # settings of no section


class SettingsError(ValueError):
    """A setting that cannot be used; the message is one clear line."""


def load_settings(
    preset: str | None = None, ablation: str | None = None, overrides: Sequence[str] = ()
) -> tuple[Settings, RuntimeConfig]:
    """Settings and runtime settings of a run.

    Args:
        preset: Name of a file in conf/preset, without suffix.
        ablation: Name of a file in conf/ablation, applied over the preset.
        overrides: `stage.field=value` pairs or `seed=value`, values in YAML; `runtime.field=value` sets runtime
            settings.

    Raises:
        SettingsError: Unknown name, unknown setting, wrong type, value out of range, or a contradiction.
    """
    start, change = _read_yaml(CONF_DIR / "base.yaml"), dict[str, Any]()
    if preset is not None:
        start = _merge(start, _read_preset(preset))
    if ablation is not None:
        change = _read_yaml(_named_file("ablation", ablation))
    for override in overrides:
        change = _merge(change, _parse_override(override))
    tree = _merge(_for_family(start, _family(_merge(start, change))), change)
    runtime = tree.pop("runtime", {})
    try:
        return Settings.model_validate(_absolute_paths(tree)), RuntimeConfig(**runtime)
    except ValidationError as error:
        raise SettingsError(_one_line(error)) from error


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
    tree = _read_yaml(_named_file("preset", name))
    extends = tree.pop("extends", None)
    return tree if extends is None else _merge(_read_preset(extends, *extending, name), tree)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _YAML)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SettingsError(f"{path} holds a {type(tree).__name__}, expected sections with settings")
    return tree


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge; a value of `change` wins, sections are merged field by field."""
    merged = dict(base)
    for name, value in change.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _parse_override(text: str) -> dict[str, Any]:
    address, equals, value = text.partition("=")
    parts = address.strip().split(".")
    if not equals or not all(parts) or (len(parts) == 1 and parts[0] not in _PLAIN_FIELDS):
        raise SettingsError(
            f"override is {text!r}, expected stage.field=value or seed=value, e.g. patch_index.max_length=4"
        )
    try:
        tree: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"override {text!r}: the value is not YAML") from error
    for part in reversed(parts):
        tree = {part: tree}
    return dict(tree)


def _family(tree: Mapping[str, Any]) -> Any:
    return (tree.get("train") or {}).get("family", DEFAULT_FAMILY)


def _for_family(tree: dict[str, Any], family: Any) -> dict[str, Any]:
    """A preset as it stands for a family: with its settings for this family, without those that only others have.

    An ablation or an override that gives such a setting is refused by the section: it would have no effect.
    """
    tree = dict(tree)
    families = tree.pop("families", {})
    for name in families:
        if name not in FAMILIES:
            raise SettingsError(f"families has settings for {name}, expected one of {', '.join(FAMILIES)}")
    if family != _family(tree):
        tree["train"] = without_other_families(tree.get("train") or {}, family)
    return _merge(tree, families.get(family, {}))


def _absolute_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """Resolve `conf:...`, a file in this folder, whatever the working directory is."""
    checkpoint = tree.get("tokenizer", {}).get("checkpoint")
    if isinstance(checkpoint, str) and checkpoint.startswith("conf:"):
        return _merge(tree, {"tokenizer": {"checkpoint": CONF_DIR / checkpoint.removeprefix("conf:")}})
    return tree


def _one_line(error: ValidationError) -> str:
    """The first problems as `address: message (found value)`, joined by semicolons."""
    lines = []
    for problem in error.errors()[:5]:
        address = ".".join(str(part) for part in problem["loc"]) or "settings"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown setting; `dpar config` lists those there are"
        elif problem["type"] != "value_error":
            message = f"{message}, found {problem['input']!r}"
        lines.append(f"{address}: {message}")
    return "; ".join(lines)
