"""Differences between an artifact and what its stage would make now, one line of text each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.cache.manifest import Manifest, Parts

Kind = Literal["setting", "input", "external", "code", "package", "schema"]
_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """One difference, as one line of text."""

    kind: Kind
    line: str


@dataclass(frozen=True)
class Target:
    """What a stage would be made from now: the key parts and the code."""

    parts: Parts
    """Parts of the key. Digests of unmade inputs are missing; if any input is unmade, so is the external digest."""
    definitions: dict[str, str]
    unmade: tuple[str, ...] = ()
    """Names of the inputs that are not made yet."""


def changes(made: Manifest, target: Target) -> list[Change]:
    """Differences from an artifact to a target: settings first, schema last. Unmade inputs are left out."""
    old, new = made.parts, target.parts
    found = [
        Change("setting", f"setting {name}: {_show(before)} -> {_show(after)}")
        for name, before, after in _differences(flat(old["settings"]), flat(new["settings"]))
    ]
    found += [
        Change("input", _input_line(name, before, after))
        for name, before, after in _differences(old["inputs"], new["inputs"])
        if name not in target.unmade
    ]
    if "external" in new and old["external"] != new["external"]:
        found.append(Change("external", "external files have changed"))
    if old["code"] != new["code"]:
        lines = _code_lines(made.definitions, target.definitions)
        found += [Change("code", line) for line in lines or ["code: a name now refers to another definition"]]
    found += [
        Change("package", f"package {name}: {_show(before)} -> {_show(after)}")
        for name, before, after in _differences(old["packages"], new["packages"])
    ]
    if old["schema"] != new["schema"]:
        found.append(Change("schema", f"artifact schema: {old['schema']} -> {new['schema']}"))
    return found


def nearest(made: Iterable[tuple[Path, Manifest]], target: Target) -> tuple[tuple[Path, Manifest], list[Change]] | None:
    """The artifact with the fewest differences from a target, and these differences; None if there is no artifact.

    The newest artifact wins a tie.
    """
    compared = [((path, manifest), changes(manifest, target)) for path, manifest in made]
    return min(compared, key=lambda pair: (len(pair[1]), -pair[0][1].created), default=None)


def lines(found: Collection[Change]) -> list[str]:
    """The text lines of `found`."""
    return [change.line for change in found]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted names: `{"train": {"seed": 0}}` gives `{"train.seed": 0}`.

    An empty dictionary is kept as a value.
    """
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return found


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    both = [(name, old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in sorted(old.keys() | new.keys())]
    return [(name, before, after) for name, before, after in both if repr(before) != repr(after)]


def _input_line(name: str, before: object, after: object) -> str:
    if before is _ABSENT:
        return f"input {name} is newly read"
    return f"input {name} is no longer read" if after is _ABSENT else f"input {name} has other contents"


def _code_lines(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """One line for each definition that was edited, is new or is no longer used; moved ones are left out."""
    before = {name: digest for name, digest in old.items() if new.get(name) != digest}
    after = {name: digest for name, digest in new.items() if old.get(name) != digest}
    moved = Counter(before.values()) & Counter(after.values())
    before, after = _without(before, moved), _without(after, moved)
    said = {name: "was edited" if name in new else "is no longer used" for name in before}
    said |= {name: "was edited" if name in old else "is new" for name in after}
    return [f"code {name} {what}" for name, what in sorted(said.items())]


def _without(definitions: Mapping[str, str], moved: Counter[str]) -> dict[str, str]:
    left = Counter(moved)
    kept = {}
    for name, digest in sorted(definitions.items()):
        if left[digest] > 0:
            left[digest] -= 1
        else:
            kept[name] = digest
    return kept


def _show(value: object) -> str:
    if value is _ABSENT:
        return "absent"
    return "none" if value is None else str(value)
