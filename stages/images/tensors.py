"""Pixels as tensors for the models, and back."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from stages.runtime.arrays import PixelBatch


def pixels_to_float(pixels: PixelBatch, device: torch.device | str = "cpu") -> Float32[Tensor, "B 3 height width"]:
    """Images as float32 in [-1, 1] on a device.

    Bytes are copied to the device and converted there: the transfer is a quarter as large, and the CPU, which has
    images to decode, does no work.
    """
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def float_to_pixels(images: Float[Tensor, "B 3 height width"]) -> PixelBatch:
    """Images in [-1, 1], on any device, as pixels on the CPU. The exact inverse of `pixels_to_float`.

    Source: ADM and LlamaGen sampling: clamp(127.5 x + 128, 0, 255), truncated to an integer.
    """
    pixels = images.float().mul(127.5).add_(128.0).clamp_(0.0, 255.0).byte()
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())
