"""Token stores to measure on: codes as skewed as real ones, or a store of ImageNet's size that takes little room."""

from __future__ import annotations

import json
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from stages.stores.layout import CRC_BYTES
from stages.stores.tokens import TokenFacts, token_writer

CODEBOOK, ZIPF_EXPONENT = 16_384, 0.6
GRID = 16
TOKENS = GRID * GRID
CHUNK_ROWS = 8192


def token_facts(num_images: int, num_views: int = 1) -> TokenFacts:
    """Facts of a store of images of 256 px."""
    return TokenFacts(
        num_images=num_images,
        num_train=num_images,
        num_classes=1000,
        num_views=num_views,
        num_tokens=TOKENS,
        grid=GRID,
        chunk_rows=CHUNK_ROWS,
        codebook_size=CODEBOOK,
        image_size=256,
        views="ten_crop",
        view_names=[f"view {view}" for view in range(num_views)],
        vq_sha256="0" * 64,
    )


def write_tokens(path: Path, num_images: int) -> str:
    """Write a finished store of one view whose codes follow Zipf's law, in no order; returns its digest."""
    writer = token_writer(path, token_facts(num_images))
    frequencies = np.arange(1, CODEBOOK + 1) ** -ZIPF_EXPONENT
    edges = np.cumsum(frequencies / frequencies.sum())
    for unit in writer.pending():
        generator = np.random.default_rng(unit)
        rows = writer.spec.count_rows([unit])
        tokens = draw(generator, edges, rows * TOKENS).reshape(rows, 1, TOKENS)
        writer.write(unit, tokens=tokens, labels=generator.integers(0, 1000, rows, dtype=np.uint16))
    return writer.finish()


def draw(generator: np.random.Generator, edges: NDArray[np.float64], count: int) -> NDArray[np.uint16]:
    """Codes with the cumulated frequencies `edges`, the frequent ones spread over the codebook."""
    names = np.random.default_rng(0).permutation(CODEBOOK).astype(np.uint16)
    return names[np.searchsorted(edges[:-1], generator.random(count, dtype=np.float32))]


def lay_out_tokens(path: Path, num_images: int, num_views: int) -> None:
    """Lay out a store that holds only zeros: files with holes, which take a page each on disk for their checksum."""
    writer = token_writer(path, token_facts(num_images, num_views))
    for array in writer.spec.arrays:
        size = writer.spec.chunk_bytes(array) - CRC_BYTES
        checksum = google_crc32c.value(bytes(size)).to_bytes(CRC_BYTES, "little")
        for unit in range(writer.spec.num_units):
            for key in writer.spec.chunk_keys(array, unit):
                (path / key).parent.mkdir(parents=True, exist_ok=True)
                with (path / key).open("wb") as file:
                    file.seek(size)
                    file.write(checksum)
    group = json.loads((path / "zarr.json").read_text())
    group["attributes"]["dpar"] |= {"digest": "0" * 64, "complete": True}
    (path / "zarr.json").write_text(json.dumps(group))
