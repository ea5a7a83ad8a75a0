"""Images of tokens: decoded a few at a time, resized, as pixels on the CPU."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from models.vq import VQModel
from stages.images.limits import DECODED_PIXELS
from stages.images.tensors import float_to_bytes
from stages.runtime.arrays import PixelBatch
from stages.runtime.transfer import Download, one_behind


@torch.inference_mode()
def images_of_tokens(vq: VQModel, tokens: Int[Tensor, "B T"], size: int) -> PixelBatch:
    """Images of tokens on any device, resized to `size` pixels along a side.

    Memory does not grow with the batch. Convolutions round differently for other numbers of images, on a CPU too: of
    10,000 bytes at most a few differ by one from those of another batch.
    """
    most = max(1, DECODED_PIXELS // (tokens.shape[1] * vq.config.downsample**2))
    parts = tokens.tensor_split(-(-len(tokens) // most))
    started = (Download(float_to_bytes(resize(vq.decode(part), size))) for part in parts)
    return np.concatenate([part.numpy() for part in one_behind(started)])


def resize(images: Float[Tensor, "B 3 _ _"], size: int) -> Float[Tensor, "B 3 {size} {size}"]:
    """Decoded images at the evaluation size, `size` pixels.

    Source: LlamaGen's evaluation of 384 px models: bicubic without antialiasing, on floats.
    """
    if images.shape[-1] == size:
        return images
    return F.interpolate(images.float(), size=(size, size), mode="bicubic")
