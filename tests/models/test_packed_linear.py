"""Packed linear layers against the layers that they were made from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.config import GPTConfig
from models.gpt import GPT
from models.packed_linear import PackedLinear, pack_linear_layers

BFLOAT16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""Whether oneDNN multiplies bfloat16 on this CPU: it needs AVX-512 or AVX-NE-CONVERT."""


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(
            torch.bfloat16, marks=pytest.mark.skipif(not BFLOAT16, reason="this CPU lacks bfloat16 in oneDNN")
        ),
    ],
)
@pytest.mark.parametrize("shape", [(1, 24), (8, 24), (3, 5, 24), (130, 24)])
def test_products_are_those_of_the_layer(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40, bias=False).to(dtype), torch.randn(shape).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(layer)(x), layer(x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_packed_where_the_cpu_allows_and_its_logits_stay(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = GPTConfig(dim=32, num_layers=2, num_heads=2, codebook_size=50, num_tokens=16, num_classes=3)
    model = GPT(config).to(dtype).eval()
    nn.init.normal_(model.output.weight)
    tokens, labels = torch.randint(50, (4, 16)), torch.tensor([0, 1, 2, 0])
    with torch.inference_mode():
        expected = model(tokens, labels)
        pack_linear_layers(model)
        packed = dtype == torch.float32 or BFLOAT16
        linear, others = (nn.Linear, PackedLinear) if not packed else (PackedLinear, nn.Linear)
        assert sum(isinstance(module, linear) for module in model.modules()) == 2 * 5 + 1
        assert not any(isinstance(module, others) for module in model.modules())
        tolerance = 1e-5 if dtype == torch.float32 else 0.3
        torch.testing.assert_close(model(tokens, labels), expected, atol=tolerance, rtol=tolerance)


def test_what_cannot_be_packed_stays() -> None:
    double = nn.Sequential(nn.Linear(4, 4, bias=False).double())
    pack_linear_layers(double)
    assert isinstance(double[0], nn.Linear)
    with pytest.raises(ValueError, match="has a bias"):
        PackedLinear(nn.Linear(4, 4))
