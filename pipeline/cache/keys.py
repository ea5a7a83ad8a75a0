"""The key of a stage: a digest of everything that decides what it makes, kept verbatim so that changes can be told."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from conf.schema import Settings
from pipeline.cache.external import external_digest
from pipeline.cache.fingerprint import Fingerprint
from pipeline.cache.manifest import SCHEMA, Parts
from pipeline.graph import Stage


def key_parts(
    stage: Stage,
    settings: Settings,
    home: Path,
    input_digests: Mapping[str, str],
    code: Fingerprint,
    *,
    deep: bool = False,
) -> Parts:
    """Everything that decides what `stage` makes: settings, code, contents of its inputs, versions, outside files.

    Args:
        stage: A stage of the graph.
        settings: Of the whole run.
        home: Where the digests of outside files are remembered.
        input_digests: Content digest of each input.
        code: Of the stage.
        deep: Look at every image file, whatever is remembered of its folder.

    Raises:
        InputError: A file or folder that the settings name is missing.
    """
    section = getattr(settings, stage.name)
    deep = deep and stage.external == "images"  # weights are read again only when a stage that needs them starts
    inside = inside_parts(stage, settings, input_digests, code)
    return inside | {"external": external_digest(stage, section, home, deep=deep)}


def inside_parts(stage: Stage, settings: Settings, input_digests: Mapping[str, str], code: Fingerprint) -> Parts:
    """What `key_parts` returns, without the files outside."""
    return {
        "schema": SCHEMA,
        "stage": stage.name,
        "settings": getattr(settings, stage.name).key_fields(),
        "code": code.digests,
        "inputs": dict(sorted(input_digests.items())),
        "packages": {name: _minor_version(name) for name in stage.packages},
    }


@lru_cache(maxsize=64)
def _minor_version(package: str) -> str:
    try:
        return ".".join(version(package).split(".")[:2])
    except PackageNotFoundError:
        return "not installed"
