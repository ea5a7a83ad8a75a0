"""The key of a stage: a digest of everything that decides what it makes, kept verbatim so that changes can be told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from conf.schema import Settings
from pipeline.cache.external import external_digest
from pipeline.graph import Stage
from pipeline.project import Project

SCHEMA = 1  # of artifacts: raise it when their layout changes, and every stage runs again
Parts = dict[str, Any]


def key_parts(
    project: Project, stage: Stage, settings: Settings, home: Path, input_digests: Mapping[str, str]
) -> Parts:
    """Everything that decides what `stage` makes: settings, code, contents of its inputs, versions, outside files.

    Raises:
        InputError: A file or folder that the settings name is missing.
        FingerprintError: Code that cannot be followed.
    """
    section = getattr(settings, stage.name)
    return {
        "schema": SCHEMA,
        "stage": stage.name,
        "settings": section.key_fields(),
        "code": project.fingerprint(stage, home).digests,
        "inputs": dict(sorted(input_digests.items())),
        "packages": {name: _minor_version(name) for name in stage.packages},
        "external": external_digest(stage, section, home),
    }


def key_of(parts: Parts) -> str:
    """Stage and digest, e.g. `train-1f0c…`: the name of the artifact's folder."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return f"{parts['stage']}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def changes(old: Parts, new: Parts) -> list[str]:
    """What differs between two keys' parts, one line a change, the telling ones first."""
    lines = [
        f"setting {name}: {_show(before)} -> {_show(after)}"
        for name, before, after in _differences(_flat(old["settings"]), _flat(new["settings"]))
    ]
    lines += [f"input {name} has other contents" for name, _, _ in _differences(old["inputs"], new["inputs"])]
    if old["external"] != new["external"]:
        lines.append("the files it reads from outside have changed")
    if old["code"] != new["code"]:
        lines.append("its code was edited")
    lines += [
        f"package {name}: {_show(before)} -> {_show(after)}"
        for name, before, after in _differences(old["packages"], new["packages"])
    ]
    if old["schema"] != new["schema"]:
        lines.append(f"artifact schema: {old['schema']} -> {new['schema']}")
    return lines


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = sorted(old.keys() | new.keys())
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _show(value: Any) -> str:
    return "none" if value is None else str(value)


@lru_cache(maxsize=64)
def _minor_version(package: str) -> str:
    try:
        return ".".join(version(package).split(".")[:2])
    except PackageNotFoundError:
        return "not installed"
