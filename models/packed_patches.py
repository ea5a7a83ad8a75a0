"""Packed layout of the patches of a ragged batch: how the encoder's tokens become rows of the global sequence.

The encoder reads x_0 .. x_{T-2} of every image. The global sequence is [class, patch 0, patch 1, ...] of the first
image, then of the second, and so on, without padding.

Source: DPAR (arXiv 2512.21867), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class PackedPatches:
    """The patches of a batch: P patches of the encoder's T - 1 tokens of B images, and G = P + B global rows.

    Indices are int32, which halves what is copied to the device.
    """

    global_lengths: list[int]
    """Global rows of each image: one for the class and one for each patch. Python numbers: reading them is no sync."""
    tokens: Int[Tensor, "P L"]
    """Tokens of each patch, as rows of the encoder output (B * (T - 1), D). Short patches repeat their last token."""
    valid: Bool[Tensor, "P L"]
    """Which entries of `tokens` are real and not repeated."""
    first: Int[Tensor, " P"]
    """Position of a patch's first token in its image."""
    last: Int[Tensor, " P"]
    """Position of a patch's last token in its image."""
    number: Int[Tensor, " P"]
    """Number of the patch in its image, from 0."""
    global_order: Int[Tensor, " G"]
    """Source of each global row: its index in [class of every image, every patch]."""
    target_rows: Int[Tensor, "B T"]
    """Global row whose output serves the prediction of each token."""

    def to(self, device: torch.device) -> PackedPatches:
        """The same patches with their tensors on `device`."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedPatches:
        """The same patches with `change` applied to each tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        return PackedPatches(**changed)


def pack_patches(starts: Bool[Tensor, "B T"]) -> PackedPatches:
    """Lay out the patches of a batch, on the CPU, from where they start.

    The encoder does not read the last token, so patches end at token T - 2 at the latest. A patch that is shortened by
    this is not read by any prediction.

    Raises:
        ValueError: The starts are not (images, tokens), there are fewer than two tokens, or the first token of an image
            does not start a patch.
    """
    if starts.ndim != 2 or starts.shape[1] < 2:
        raise ValueError(f"starts are {tuple(starts.shape)}, expected (images, T) with two tokens or more")
    if not bool(starts[:, 0].all()):
        raise ValueError("the first token of an image starts no patch, expected one in every image")
    marks = starts.numpy()
    batch, width = len(marks), marks.shape[1] - 1
    counts = marks[:, :-1].sum(axis=1, dtype=np.int32)
    before = np.cumsum(counts, dtype=np.int32) - counts  # patches of all images before
    class_rows = before + np.arange(batch, dtype=np.int32)
    flat = np.flatnonzero(marks[:, :-1]).astype(np.int32)
    lengths = np.diff(flat, append=np.int32(batch * width))
    first = flat - np.repeat(width * np.arange(batch, dtype=np.int32), counts)
    # Patch p, counted over the batch, of image i is global row p + i + 1 and has index B + p: row + B - 1 - i.
    global_order = np.arange(batch + len(flat), dtype=np.int32)
    global_order += np.repeat(np.arange(batch, dtype=np.int32)[::-1], counts + 1)
    global_order[class_rows] = np.arange(batch)
    targets = marks.cumsum(axis=1, dtype=np.int32)
    targets += (class_rows - 1)[:, None]
    return PackedPatches(
        global_lengths=(counts + 1).tolist(),
        tokens=torch.from_numpy(_ranges(flat, lengths)),
        valid=torch.from_numpy(np.take(np.tri(lengths.max() + 1, lengths.max(), -1, dtype=np.bool_), lengths, axis=0)),
        first=torch.from_numpy(first),
        last=torch.from_numpy(first + lengths - 1),
        number=torch.from_numpy(np.arange(len(flat), dtype=np.int32) - np.repeat(before, counts)),
        global_order=torch.from_numpy(global_order),
        target_rows=torch.from_numpy(targets),
    )


def _ranges(first: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """Rows (P, L) that count up from `first` for `lengths` numbers. Short rows repeat their last number.

    The loop is over columns, because numpy's overhead per row would exceed the work in these short rows.
    """
    last = first + lengths - 1
    rows = np.empty((len(first), lengths.max()), dtype=np.int32)
    for offset, column in enumerate(rows.T):
        np.minimum(first + np.int32(offset), last, out=column)
    return rows
