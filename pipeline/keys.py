"""The key of a stage: a digest of everything that decides what it makes, kept verbatim so that changes can be told."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from conf.schema import Settings
from pipeline.external import external_digest
from pipeline.graph import Stage
from pipeline.manifest import SCHEMA, Parts, key_of
from pipeline.project import Project

__all__ = ["SCHEMA", "Parts", "definitions", "inputs_read", "inside_parts", "key_of", "key_parts"]


def inputs_read(stage: Stage, settings: Settings) -> tuple[str, ...]:
    """The inputs of `stage` that it reads under these settings: the others are in no key and nothing waits for them."""
    unread = getattr(settings, stage.name).unread_inputs
    return tuple(name for name in stage.inputs if name not in unread)


def key_parts(
    project: Project,
    stage: Stage,
    settings: Settings,
    home: Path,
    input_digests: Mapping[str, str],
    *,
    deep: bool = False,
) -> Parts:
    """Everything that decides what `stage` makes: settings, code, contents of its inputs, versions, outside files.

    Args:
        project: The graph and its code.
        stage: One of its stages.
        settings: Of the whole run.
        home: Where the digests of outside files are remembered.
        input_digests: Content digest of each input.
        deep: Look at every image file, whatever is remembered of its folder.

    Raises:
        InputError: A file or folder that the settings name is missing.
        FingerprintError: Code that cannot be followed.
    """
    section = getattr(settings, stage.name)
    inside = inside_parts(project, stage, settings, input_digests)
    deep = deep and stage.external == "images"  # weights are read again only when a stage that needs them starts
    return inside | {"external": external_digest(stage, section, home, deep=deep)}


def inside_parts(project: Project, stage: Stage, settings: Settings, input_digests: Mapping[str, str]) -> Parts:
    """What `key_parts` returns, without the files outside.

    Raises:
        FingerprintError: Code that cannot be followed.
    """
    return {
        "schema": SCHEMA,
        "stage": stage.name,
        "settings": getattr(settings, stage.name).key_fields(),
        "code": project.code.fingerprint(stage.entry).digests,
        "inputs": dict(sorted(input_digests.items())),
        "packages": {name: _minor_version(name) for name in stage.packages},
    }


def definitions(project: Project, stage: Stage) -> dict[str, str]:
    """Digest of the text of each definition in a stage's code, by "module:name": for people, in no key."""
    return project.code.fingerprint(stage.entry).definitions


@lru_cache(maxsize=64)
def _minor_version(package: str) -> str:
    try:
        return ".".join(version(package).split(".")[:2])
    except PackageNotFoundError:
        return "not installed"
