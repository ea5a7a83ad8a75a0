"""Held-out metrics of a model during training. They are written to metrics.jsonl; no weight depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.vq import VQModel
from stages.images.limits import DECODED_PIXELS
from stages.images.tensors import float_to_pixels, pixels_to_float
from stages.runtime.artifact import write_json
from stages.runtime.distributed import World, all_reduce_sum
from stages.training.log import POSITIONS_FILE

if TYPE_CHECKING:
    from stages.training.data import TokenBatch, TokenData
    from stages.training.images import ImageFiles

_VALIDATION_IMAGES = 512
_BATCH = 128
_SLICE_LOGITS = 2**24  # 64 MiB in float32


def heldout_loss(data: TokenData, objective: nn.Module, world: World, batch_size: int = _BATCH) -> dict[str, float]:
    """Mean loss on the first view of the held-out images, float32, nats. Empty if no images are held out."""
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, images
    for batch in _heldout_batches(data, world, batch_size):
        loss, _ = objective(batch)
        total += torch.tensor([loss.item() * len(batch.tokens), len(batch.tokens)], dtype=torch.float64)
    total_loss, count = all_reduce_sum(total.to(world.device)).tolist()
    return {"heldout_loss": total_loss / count} if count else {}


@torch.no_grad()
def heldout_by_position(data: TokenData, losses: Callable[[Any], Tensor], world: World) -> dict[str, Any] | None:
    """Mean loss of each predicted position on the images of `heldout_loss`. None if no images are held out.

    All processes must call this.

    Args:
        data: The data, with its held-out images.
        losses: Gives the loss of the last S positions of a batch (B, S), nats.
        world: The processes, which divide the images.

    Returns:
        `first_position`, the first position that is predicted, and `loss`, a list that starts there, nats.
    """
    total = torch.zeros(2, data.store.num_tokens, dtype=torch.float64)  # sums of losses, images
    for batch in _heldout_batches(data, world, _BATCH):
        found = losses(batch).double()
        total[0, -found.shape[1] :] += found.sum(dim=0).cpu()
        total[1, -found.shape[1] :] += len(found)
    sums, counts = all_reduce_sum(total.to(world.device)).cpu()
    first = int((counts == 0).sum())
    if first == len(counts):
        return None
    return {"first_position": first, "loss": (sums[first:] / counts[first:]).tolist()}


def write_positions(output: Path, found: dict[str, Any] | None) -> None:
    """Write the result of `heldout_by_position` to the record, if there is one."""
    if found is not None:
        write_json(output / POSITIONS_FILE, found)


def token_losses(features: Float[Tensor, "B S D"], head: nn.Linear, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B S"]:
    """Cross-entropy of the last S tokens under the head's logits of the features, nats, float32.

    Logits are computed for a slice of the positions at a time.
    """
    targets = tokens[:, tokens.shape[1] - features.shape[1] :].flatten()
    size = max(1, _SLICE_LOGITS // head.out_features)
    parts = zip(features.flatten(0, 1).split(size), targets.split(size), strict=True)
    found = [F.cross_entropy(head(rows).float(), wanted, reduction="none") for rows, wanted in parts]
    return torch.cat(found).unflatten(0, features.shape[:2])


def _heldout_batches(data: TokenData, world: World, batch_size: int) -> Iterator[TokenBatch]:
    """This process's batches of the first views of the held-out images."""
    rows = np.arange(data.store.num_train, len(data.store))
    for first in range(world.rank * batch_size, len(rows), world.size * batch_size):
        images = rows[first : first + batch_size]
        yield data.batch(images, np.zeros_like(images))


def reconstruction_scores(model: VQModel, images: ImageFiles, world: World) -> dict[str, float]:
    """PSNR in dB and codebook usage on held-out images, or on training images if none are held out."""
    rows = np.arange(images.index.num_train, len(images.index))
    if not len(rows):
        rows = np.arange(len(images.index))
    rows = rows[:: max(1, len(rows) // _VALIDATION_IMAGES)]
    errors: list[float] = []
    used = torch.zeros(model.config.codebook_size, dtype=torch.bool)
    for batch in images.center_batches(rows, max(1, DECODED_PIXELS // images.size**2)):
        tokens = model.encode(pixels_to_float(batch, world.device))
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
