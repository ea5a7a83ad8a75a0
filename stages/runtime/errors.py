"""Errors that a person can act on. The message is one line: found, expected, where, what to do."""

from __future__ import annotations


class InputError(ValueError):
    """Something that the user gave cannot be used: a path, an image folder, a weights file. Exit code 2."""


class StaleIndexError(InputError):
    """Images are not what the dataset stage indexed. The next run indexes them again, whatever their metadata say."""


class ArtifactError(RuntimeError):
    """An artifact or a store is damaged, incomplete or of another format. Exit code 1."""
