"""Facts of toy token stores, for the tests of several packages."""

from __future__ import annotations

from typing import Any

from stages.stores.tokens import TokenFacts


def token_facts(**changes: Any) -> TokenFacts:
    """Facts of 11 images in two views of 4 x 4 tokens, 4 images a chunk; `changes` replace fields."""
    values: dict[str, Any] = {
        "num_images": 11,
        "num_train": 8,
        "num_classes": 3,
        "num_views": 2,
        "num_tokens": 16,
        "grid": 4,
        "chunk_rows": 4,
        "codebook_size": 50,
        "image_size": 64,
        "views": "flip",
        "view_names": ["center", "mirrored/center"],
        "vq_sha256": "0" * 64,
    }
    return TokenFacts(**values | changes)
