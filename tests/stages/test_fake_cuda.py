"""What stages compute on a GPU, on a simulated one: on one device, and without a wait of the host."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, HostWaits, fake_cuda
from torch import Tensor

from conf.entropy_map import EntropyMapConfig
from conf.tokenize import TokenizeConfig
from models.config import GPTConfig, VQConfig
from models.gpt import GPT
from models.vq import VQModel
from stages.entropy_map import Mapper
from stages.images import from_tokens
from stages.images.tensors import float_to_bytes, pixels_to_float
from stages.runtime.distributed import World
from stages.tokenize import Encoder

WORLD = World(rank=0, size=1, device=CUDA)
VQ = VQConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=32, codebook_size=64)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostWaits]:
    """Host waits since the last `clear` of the record. Arrays become fake tensors of their shape and type."""
    plain = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: torch.empty(array.shape, dtype=plain(array.flat[:1]).dtype))
    with fake_cuda(monkeypatch) as found:
        yield found


def vq() -> VQModel:
    with CUDA:
        return VQModel(VQ).eval()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_views_are_encoded_without_a_wait(waits: HostWaits, precision: str) -> None:
    encoder = Encoder(vq(), TokenizeConfig(precision=precision), 2, WORLD)
    waits.found.clear()
    tokens = encoder.encode(np.zeros((4, 16, 16, 3), np.uint8))
    assert (tokens.shape, tokens.device, tokens.dtype) == ((4, 64), CUDA, torch.int64)
    assert waits.found == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_entropies_are_mapped_without_a_wait(waits: HostWaits, precision: str) -> None:
    with CUDA:
        model = GPT(GPTConfig(dim=32, num_layers=2, num_heads=2, codebook_size=64, num_tokens=16, num_classes=None))
    mapper = Mapper(model.eval(), None, EntropyMapConfig(precision=precision), WORLD)  # type: ignore[arg-type]
    mapper.batch(np.zeros((3, 16), np.uint16))  # makes the tables of positions
    waits.found.clear()
    entropies = mapper.batch(np.zeros((3, 16), np.uint16))
    assert (entropies.shape, entropies.device, entropies.dtype) == ((3, 16), CUDA, torch.float32)
    assert waits.found == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 8])
def test_samples_are_decoded_without_a_wait_between_their_parts(
    waits: HostWaits, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    parts = list[Tensor]()

    class Recorded:
        def __init__(self, tensor: Tensor) -> None:
            parts.append(tensor)
            self.shape = tuple(tensor.shape)

        def numpy(self) -> np.ndarray:
            return np.zeros(self.shape, np.uint8)

    monkeypatch.setattr(from_tokens, "Download", Recorded)
    monkeypatch.setattr(from_tokens, "DECODED_PIXELS", 2 * 16 * 16)
    model, tokens = vq(), torch.zeros(5, 64, dtype=torch.int64, device=CUDA)
    waits.found.clear()
    from_tokens.images_of_tokens(model, tokens, size)
    assert [part.shape for part in parts] == [(2, size, size, 3), (2, size, size, 3), (1, size, size, 3)]
    assert {part.device for part in parts} == {CUDA}
    assert waits.found == []


def test_only_bytes_are_copied(waits: HostWaits) -> None:
    floats = pixels_to_float(np.zeros((2, 16, 16, 3), np.uint8), CUDA)
    assert (floats.shape, floats.device, floats.dtype) == ((2, 3, 16, 16), CUDA, torch.float32)
    found = float_to_bytes(floats)
    assert (found.shape, found.device, found.dtype) == ((2, 16, 16, 3), CUDA, torch.uint8)
    assert found.is_contiguous()
    assert waits.found == []
