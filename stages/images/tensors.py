"""Pixels as tensors for the models, and back."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from stages.runtime.arrays import PixelBatch
from stages.runtime.transfer import to_device


def pixels_to_float(pixels: PixelBatch, device: torch.device | str = "cpu") -> Float32[Tensor, "B 3 height width"]:
    """Images as float32 in [-1, 1] on a device.

    Bytes are copied to the device and converted there: the transfer is a quarter as large, and the CPU, which has
    images to decode, does no work.
    """
    here = to_device(torch.from_numpy(pixels), torch.device(device))
    return here.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def float_to_pixels(images: Float[Tensor, "B 3 height width"]) -> PixelBatch:
    """Images in [-1, 1], on any device, as pixels on the CPU. The exact inverse of `pixels_to_float`."""
    pixels: PixelBatch = float_to_bytes(images).cpu().numpy()
    return pixels


def float_to_bytes(images: Float[Tensor, "B 3 height width"]) -> UInt8[Tensor, "B height width 3"]:
    """The same on the device of the images.

    Source: ADM and LlamaGen sampling: clamp(127.5 x + 128, 0, 255), truncated to an integer.
    """
    return images.float().mul(127.5).add_(128.0).clamp_(0.0, 255.0).byte().permute(0, 2, 3, 1).contiguous()
