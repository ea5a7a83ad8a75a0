"""Packing a batch's patches, held against plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.packed_patches import pack_patches


def packed_by_hand(starts: list[list[bool]]) -> dict[str, list]:
    """The layout of `PackedPatches`, patch after patch in plain Python."""
    width = len(starts[0]) - 1
    patches, lengths, targets = [], [], []
    for image, row in enumerate(starts):
        first = [place for place in range(width) if row[place]]
        class_row = sum(lengths)
        patches += [(image, number, a, b) for number, (a, b) in enumerate(zip(first, [*first[1:], width], strict=True))]
        targets.append([class_row + sum(row[: place + 1]) - 1 for place in range(width + 1)])
        lengths.append(len(first) + 1)
    longest = max(b - a for _, _, a, b in patches)
    order: list[int] = []
    for image in range(len(starts)):
        order += [image, *(len(starts) + place for place, patch in enumerate(patches) if patch[0] == image)]
    return {
        "global_lengths": lengths,
        "tokens": [[i * width + min(a + place, b - 1) for place in range(longest)] for i, _, a, b in patches],
        "valid": [[a + place < b for place in range(longest)] for _, _, a, b in patches],
        "first": [a for _, _, a, _ in patches],
        "last": [b - 1 for _, _, _, b in patches],
        "number": [number for _, number, _, _ in patches],
        "global_order": order,
        "target_rows": targets,
    }


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data(), tokens=st.integers(2, 12), images=st.integers(1, 5))
def test_patches_are_packed_as_by_hand(data: st.DataObject, tokens: int, images: int) -> None:
    row = st.lists(st.booleans(), min_size=tokens - 1, max_size=tokens - 1)
    starts = [[True, *data.draw(row)] for _ in range(images)]
    found = vars(pack_patches(torch.tensor(starts)))
    assert {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in found.items()} == packed_by_hand(starts)
