"""Held-out metrics of a model during training. They are written to metrics.jsonl; no weight depends on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from models.vq import VQModel
from stages.images.tensors import float_to_pixels, pixels_to_float
from stages.runtime.distributed import World, all_reduce_sum

if TYPE_CHECKING:
    from stages.training.data import TokenData
    from stages.training.images import ImageFiles

_VALIDATION_IMAGES = 512


def heldout_loss(data: TokenData, objective: nn.Module, world: World, batch_size: int = 128) -> dict[str, float]:
    """Mean loss on the first view of the held-out images, float32, nats. Empty if no images are held out."""
    rows = np.arange(data.store.num_train, len(data.store))
    if not len(rows):
        return {}
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, images
    for first in range(world.rank * batch_size, len(rows), world.size * batch_size):
        images = rows[first : first + batch_size]
        loss, _ = objective(data.batch(images, np.zeros_like(images)))
        total += torch.tensor([loss.item() * len(images), len(images)], dtype=torch.float64)
    total_loss, count = all_reduce_sum(total.to(world.device)).tolist()
    return {"heldout_loss": total_loss / count}


def reconstruction_scores(model: VQModel, images: ImageFiles, world: World) -> dict[str, float]:
    """PSNR in dB and codebook usage on held-out images, or on training images if none are held out."""
    rows = np.arange(images.index.num_train, len(images.index))
    if not len(rows):
        rows = np.arange(len(images.index))
    rows = rows[:: max(1, len(rows) // _VALIDATION_IMAGES)]
    errors: list[float] = []
    used = torch.zeros(model.config.codebook_size, dtype=torch.bool)
    for batch in images.center_batches(rows, 64):
        tokens = model.encode(pixels_to_float(batch).to(world.device))
        decoded = float_to_pixels(model.decode(tokens))
        used[tokens.unique().cpu()] = True
        squared = (decoded.astype(np.float64) - batch) ** 2
        errors.extend(squared.reshape(len(batch), -1).mean(axis=1))
    psnr = 10 * np.log10(255.0**2 / np.maximum(errors, 1e-10))
    return {
        "psnr": float(psnr.mean()),
        "heldout_codebook_usage": float(used.float().mean()),
        "num_images": float(len(rows)),
    }
