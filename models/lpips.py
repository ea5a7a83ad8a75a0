"""LPIPS, the perceptual loss of the tokenizer: a weighted distance of normalised VGG16 features.

Source: Zhang et al. (arXiv 1801.03924), section 3.1, equation 1; version 0.1 of the linear heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# Output widths of the thirteen convolutions; a max pool precedes each block but the first.
_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Distance of two images, from the last features of each VGG16 block. The weights are frozen."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        widths = [width for block in _BLOCKS for width in block]
        self.convs = nn.ModuleList(
            nn.Conv2d(width_in, width, 3, padding=1) for width_in, width in zip([3, *widths], widths, strict=False)
        )
        self.heads = nn.ParameterList(torch.zeros(block[-1]) for block in _BLOCKS)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(
        self, images: Float[Tensor, "B 3 height width"], others: Float[Tensor, "B 3 height width"]
    ) -> Float[Tensor, " B"]:
        """Distance of each pair of images in [-1, 1], float32. The gradient reaches `images` only."""
        with torch.no_grad():
            targets = self._features(others)
        total = torch.zeros(len(images), device=images.device)
        for head, feature, target in zip(self.heads, self._features(images), targets, strict=True):
            difference = (_unit(feature) - _unit(target)).square()  # (B, C, h, w)
            total = total + torch.einsum("bchw,c->b", difference, head) / difference[0, 0].numel()
        return total

    def _features(self, images: Float[Tensor, "B 3 height width"]) -> list[Float[Tensor, "B _ _ _"]]:
        hidden = (images - self.shift) / self.scale
        convs = iter(self.convs)
        features = []
        for index, block in enumerate(_BLOCKS):
            hidden = F.max_pool2d(hidden, 2) if index else hidden
            for _ in block:
                hidden = F.relu(next(convs)(hidden))
            features.append(hidden)
        return features


def _unit(features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
    """Each position's features divided by their length, float32."""
    features = features.float()
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
