"""Parts of a stage's key: everything that determines its result. The manifest stores them, so changes can be listed."""

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
    """Everything that determines the result of `stage`: settings, code, inputs, package versions, external files.

    Args:
        stage: A stage of the graph.
        settings: Settings of all stages.
        home: Folder of the cache, where digests of external files are remembered.
        input_digests: Content digest of each input.
        code: Fingerprint of the stage's code.
        deep: Check every image file, even in folders that are unchanged.

    Raises:
        InputError: A file or folder named in the settings is missing.
    """
    section = getattr(settings, stage.name)
    deep = deep and stage.external == "images"  # weights are read again only when a stage that needs them starts
    inside = inside_parts(stage, settings, input_digests, code)
    return inside | {"external": external_digest(stage, section, home, deep=deep)}


def inside_parts(stage: Stage, settings: Settings, input_digests: Mapping[str, str], code: Fingerprint) -> Parts:
    """`key_parts` without the digest of external files."""
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
