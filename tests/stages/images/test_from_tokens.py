"""Images of tokens: a few at a time give the same pixels as all at once, at the size that is scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.config import VQConfig
from models.vq import VQModel
from stages.images import from_tokens
from stages.images.from_tokens import images_of_tokens, resize
from stages.images.tensors import float_to_pixels

COUNT, GRID = 11, 8


@pytest.fixture(scope="module")
def vq() -> VQModel:
    torch.manual_seed(0)
    config = VQConfig(channels=32, channel_multipliers=(1, 2, 2), z_channels=32, codebook_size=64)
    return VQModel(config).eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(64, (COUNT, GRID * GRID), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("together", [1, 2, 4, COUNT])
def test_parts_have_the_pixels_of_the_whole(
    vq: VQModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    with torch.inference_mode():
        whole = float_to_pixels(vq.decode(tokens))
    monkeypatch.setattr(from_tokens, "DECODED_PIXELS", together * (4 * GRID) ** 2)
    found = images_of_tokens(vq, tokens, 4 * GRID)
    difference = np.abs(found.astype(np.int64) - whole)
    assert difference.max() <= (together < COUNT)
    assert difference.mean() < 1e-3


def test_no_more_are_decoded_at_a_time_than_the_bound_allows(
    vq: VQModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = list[int]()
    vq.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(from_tokens, "DECODED_PIXELS", 4 * (4 * GRID) ** 2 + 1)
    images_of_tokens(vq, tokens, 16)
    assert sizes == [4, 4, 3], "parts of nearly one size"
    monkeypatch.setattr(from_tokens, "DECODED_PIXELS", 1)
    images_of_tokens(vq, tokens[:2], 16)
    assert sizes[3:] == [1, 1], "an image larger than the bound is decoded alone"


def cubic_weight(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel at a = -0.75."""
    a, x = -0.75, np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resampling_matrix(old: int, new: int) -> np.ndarray:
    """Bicubic weights (new, old) of four neighbours, edges repeated. Smaller images do not widen the kernel."""
    matrix = np.zeros((new, old))
    for row in range(new):
        place = (row + 0.5) * old / new - 0.5
        for neighbour in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            matrix[row, np.clip(neighbour, 0, old - 1)] += cubic_weight(np.array(place - neighbour))
    return matrix


@pytest.mark.parametrize("size", [5, 6, 12])
def test_resizing_is_bicubic_without_antialiasing(size: int) -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    matrix = resampling_matrix(8, size)
    expected = np.einsum("ij,bcjk,lk->bcil", matrix, images.double().numpy(), matrix)
    np.testing.assert_allclose(resize(images, size).numpy(), expected, atol=1e-5)


def test_nothing_is_resized_at_equal_size() -> None:
    images = torch.rand(1, 3, 8, 8)
    assert resize(images, 8) is images
