"""Linear layers for sampling on a CPU, with weights pre-packed in oneDNN's layout.

`F.linear` packs the weight at every call. With the few rows of a sampling step, packing takes most of the time. The
products are the same.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer without bias whose weight is packed once. It cannot be trained, saved or moved.

    Raises:
        ValueError: The layer has a bias.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        if layer.bias is not None:
            raise ValueError("the linear layer has a bias, expected one without: this project's have none")
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... E"]:
        """The output of the layer that was packed."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return product


def pack_linear_layers(model: nn.Module) -> None:
    """Replace the linear layers of a trained model in place. Layers that oneDNN cannot pack stay as they are."""
    for name, module in model.named_children():
        if isinstance(module, nn.Linear) and _can_pack(module.weight):
            setattr(model, name, PackedLinear(module))
        else:
            pack_linear_layers(module)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
