"""Linear layers for drawing on a CPU: the weight lies as oneDNN's matrix product reads it.

`F.linear` brings the weight into that order anew at every call. Of many rows nobody notices; of the few rows of a
sampling step it is most of the time. The products are the same.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer without bias, its weight packed once. It cannot be trained, saved or moved."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        if layer.bias is not None:
            raise ValueError("the linear layer has a bias, expected one without: this project's have none")
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... E"]:
        """What the layer gave that this one was made from."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return product


def pack_linear_layers(model: nn.Module) -> None:
    """Replace the linear layers of a finished model, if it lies on a CPU for which this helps."""
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
