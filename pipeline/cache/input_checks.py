"""Checks of a stage's inputs against their manifests, so that a damaged artifact is never used.

Chunks of Zarr stores are not read here. They are most of the bytes, and each is followed by its CRC-32C, which the
stage checks when it reads the chunk.
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


def require_undamaged(cache: Cache, stage: str, inputs: Mapping[str, Manifest]) -> None:
    """Check the files of the artifacts that a stage reads, except Zarr chunks.

    Raises:
        InputError: An artifact was replaced or removed since it was looked up.
        ArtifactError: An artifact is damaged. It is marked as damaged and counts as stale from then on.
    """
    require_unchanged(cache, stage, inputs)
    for name, manifest in inputs.items():
        path = cache.path(manifest.key)
        what = next((what for _, what in cache.damages(path, manifest, deep=True, skip=is_chunk)), None)
        if what is not None:
            cache.mark(path, what)
            raise ArtifactError(
                f"{stage} reads {name}, which is damaged: {what} (in {path}): make {name} again with `dpar run`"
            )


def require_unchanged(cache: Cache, stage: str, inputs: Mapping[str, Manifest]) -> None:
    """Check that a stage's inputs still have the content digests in its key.

    Raises:
        InputError: An artifact was replaced by other contents, or removed.
    """
    for name, manifest in inputs.items():
        found = cache.read(cache.path(manifest.key))
        if found is None or found.digest != manifest.digest:
            state = "was removed" if found is None else "was made again with other contents"
            raise InputError(f"{stage} reads {name}, which {state} in the meantime: run again")


def mark_reported(cache: Cache, message: str, inputs: Mapping[str, Manifest]) -> None:
    """Mark the artifacts named in a stage's error as damaged, if reading all their bytes confirms the damage.

    An error may have other causes, and making an artifact again can take weeks. So each artifact is read in full first.
    """
    for manifest in inputs.values():
        path = cache.path(manifest.key)
        if " ".join(str(path).split()) in message and (what := _any_damage(cache, path, manifest)):
            cache.mark(path, what)


def _any_damage(cache: Cache, path: Path, manifest: Manifest) -> str | None:
    from stages.stores.verify import artifact_damage

    by_manifest = (what for _, what in cache.damages(path, manifest, deep=True))
    return next(by_manifest, None) or next((damage.what for damage in artifact_damage(path, [])), None)
