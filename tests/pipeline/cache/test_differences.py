"""Lines of `dpar why`: changes by name, against the nearest artifact, without code that only moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.cache.differences import Target, changes, flat, lines, nearest
from pipeline.cache.manifest import Manifest, content_digest, key_of

PARTS = {
    "schema": 2,
    "stage": "beta",
    "settings": {"value": 1, "rule": {"kind": None, "size": 2}},
    "code": ["one", "two"],
    "inputs": {"alpha": "a" * 64, "omega": "b" * 64},
    "packages": {"torch": "2.13"},
    "external": None,
}
DEFINITIONS = {"stages.beta:beta": "1", "stages.helper:increase": "2", "stages.helper:other": "3"}


def made(created: float = 0.0, **parts: Any) -> Manifest:
    parts = PARTS | parts
    return Manifest(
        key=key_of(parts),
        stage="beta",
        parts=parts,
        definitions=DEFINITIONS,
        digest=content_digest({}),
        files={},
        created=created,
        duration_s=0,
    )


def said(target: Target, **parts: Any) -> list[str]:
    return lines(changes(made(**parts), target))


def code(**renamed: str | None) -> list[str]:
    """Lines about code after definitions are replaced (`__` stands for ":"); None removes a definition."""
    new = DEFINITIONS | {f"stages.{name.replace('__', ':')}": digest for name, digest in renamed.items()}
    kept = {name: digest for name, digest in new.items() if digest is not None}
    return said(Target(PARTS | {"code": ["other"]}, kept))


def test_all_kinds_of_changes_are_listed_settings_first() -> None:
    target = Target(
        PARTS
        | {
            "schema": 99,
            "settings": {"value": 3, "rule": {"kind": "own"}, "added": None},
            "inputs": {"alpha": "c" * 64, "delta": "d" * 64},
            "packages": {"torch": "3.0"},
            "external": "e" * 64,
        },
        DEFINITIONS,
    )
    assert said(target) == [
        "setting added: absent -> none",
        "setting rule.kind: none -> own",
        "setting rule.size: 2 -> absent",
        "setting value: 1 -> 3",
        "input alpha has other contents",
        "input delta is newly read",
        "input omega is no longer read",
        "external files have changed",
        "package torch: 2.13 -> 3.0",
        "artifact schema: 2 -> 99",
    ]
    assert said(Target(PARTS, DEFINITIONS)) == []


def test_inputs_that_are_not_made_yet_are_no_difference() -> None:
    parts = {name: value for name, value in PARTS.items() if name != "external"} | {"inputs": {"alpha": "a" * 64}}
    assert said(Target(parts, DEFINITIONS, unmade=("omega",)), external="e" * 64) == []


def test_code_changes_are_listed_by_definition() -> None:
    assert code(helper__increase="9") == ["code stages.helper:increase was edited"]
    assert code(helper__added="9") == ["code stages.helper:added is new"]
    assert code(helper__other=None) == ["code stages.helper:other is no longer used"]


def test_a_definition_that_only_moved_is_not_listed() -> None:
    assert code(helper__other=None, far__other="3", helper__increase="9") == ["code stages.helper:increase was edited"]
    # Another definition now has its old name.
    assert code(helper__other="9", far__other="3") == ["code stages.helper:other was edited"]
    # It now has the name of another definition.
    assert code(helper__other="2", helper__increase=None) == ["code stages.helper:other was edited"]


def test_names_that_are_bound_anew_are_one_line() -> None:
    assert code() == ["code: a name now refers to another definition"]
    assert code(helper__other=None, far__other="3") == ["code: a name now refers to another definition"]


def test_the_nearest_artifact_is_compared_and_the_newest_of_equals() -> None:
    target = Target(PARTS, DEFINITIONS)
    near = made(1.0, settings={"value": 5, "rule": {"kind": None, "size": 2}})
    newer = made(2.0, settings={"value": 7, "rule": {"kind": None, "size": 2}})
    newest_but_far = made(9.0, settings={"value": 5, "rule": {"kind": "own", "size": 3}})
    found = nearest([(Path("near"), near), (Path("far"), newest_but_far), (Path("newer"), newer)], target)
    assert found is not None
    assert found[0] == (Path("newer"), newer)
    assert lines(found[1]) == ["setting value: 7 -> 1"]
    assert nearest([], target) is None


def test_flat_keeps_empty_groups() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": None}) == {"a.b": 1, "a.c": {}, "d": None}
