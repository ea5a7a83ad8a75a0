"""Damage must not become a result: what a stage reads is checked against its manifest as the stage starts.

Chunks of Zarr stores are left out. They are the bulk, and each carries a CRC-32C that is checked as it is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.cache.manifest import Manifest
from pipeline.cache.store import Cache
from stages.runtime.errors import ArtifactError, InputError

_CHUNK = re.compile(r"(?:.*/)?[^/]+\.zarr/(?:.*/)?c/.*")


def is_chunk(name: str) -> bool:
    """Whether a file of an artifact is a chunk of a Zarr store."""
    return _CHUNK.fullmatch(name) is not None


def require_whole(cache: Cache, stage: str, inputs: Mapping[str, Manifest]) -> None:
    """Check the files of the artifacts that a stage reads.

    Raises:
        InputError: One was replaced or removed since it was looked up.
        ArtifactError: One is damaged. It is marked, so that it counts as stale.
    """
    require_same(cache, stage, inputs)
    for name, manifest in inputs.items():
        path = cache.path(manifest.key)
        what = next((what for _, what in cache.damages(path, manifest, deep=True, skip=is_chunk)), None)
        if what is not None:
            cache.mark(path, what)
            raise ArtifactError(
                f"{stage} reads {name}, which is damaged: {what} (in {path}): `dpar run` makes {name} again"
            )


def require_same(cache: Cache, stage: str, inputs: Mapping[str, Manifest]) -> None:
    """Check that the artifacts that a stage reads have the contents that are in its key.

    Raises:
        InputError: One was replaced by other contents, or removed.
    """
    for name, manifest in inputs.items():
        found = cache.read(cache.path(manifest.key))
        if found is None or found.digest != manifest.digest:
            state = "is gone" if found is None else "was made again with other contents"
            raise InputError(f"{stage} reads {name}, which {state} meanwhile: run again")


def mark_reported(cache: Cache, message: str, inputs: Mapping[str, Manifest]) -> None:
    """Mark the artifacts that a stage's error names, if all their bytes and checksums tell of damage too.

    An error may have other causes, and to make an artifact again can take weeks: so it is read whole first.
    """
    for manifest in inputs.values():
        path = cache.path(manifest.key)
        if " ".join(str(path).split()) in message and (what := _any_damage(cache, path, manifest)):
            cache.mark(path, what)


def _any_damage(cache: Cache, path: Path, manifest: Manifest) -> str | None:
    from stages.stores.verify import artifact_damage

    by_manifest = (what for _, what in cache.damages(path, manifest, deep=True))
    return next(by_manifest, None) or next((damage.what for damage in artifact_damage(path, [])), None)
