"""Batches of images, and the loss of a VQ tokenizer on them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from conf.tokenizer import TokenizerConfig
from models.discriminator import PatchDiscriminator, discriminator_loss, generator_loss, judge_frozen
from models.lpips import LPIPS
from models.vq import VQModel
from stages.images.decode import center_crop, decode, random_crop
from stages.images.tensors import pixels_to_float
from stages.runtime import randomness
from stages.runtime.arrays import Indices, PixelBatch, Pixels
from stages.runtime.cores import available_cores
from stages.runtime.randomness import Purpose
from stages.stores.image_index import ImageIndex
from stages.training.stream import Part, SampleStream


@dataclass(frozen=True)
class ImageBatch:
    """The images of a micro-batch."""

    pixels: Float[Tensor, "B 3 height width"]
    """Values in [-1, 1]."""
    adversarial: bool
    """Whether the discriminator has started."""


@dataclass(frozen=True)
class ImageFiles:
    """The images of an index as pixels. Threads decode in parallel, because Pillow releases the GIL."""

    index: ImageIndex
    root: Path
    size: int

    def training_pixels(self, stream: SampleStream, step: int, part: Part) -> Float[Tensor, "B 3 height width"]:
        """Random crops, randomly mirrored, of the images of a micro-batch."""
        images, epochs = stream.samples(step, part)

        def crop(image: np.int64, epoch: np.int64) -> Pixels:
            generator = randomness.stream(stream.seed, Purpose.CROPS, int(epoch), int(image))
            return random_crop(self._decode(image), self.size, generator)

        with ThreadPoolExecutor(available_cores()) as pool:
            return pixels_to_float(np.stack(list(pool.map(crop, images, epochs))))

    def center_batches(self, rows: Indices, batch_size: int) -> Iterator[PixelBatch]:
        """Center crops of the given images."""
        for first in range(0, len(rows), batch_size):
            with ThreadPoolExecutor(available_cores()) as pool:
                yield np.stack(list(pool.map(self._center, rows[first : first + batch_size])))

    def _center(self, image: np.int64) -> Pixels:
        return center_crop(self._decode(image), self.size)

    def _decode(self, image: np.int64) -> Image.Image:
        return decode(self.index.read(self.root, int(image)))


class VQObjective(nn.Module):
    """Loss of the tokenizer, plus that of its discriminator once it has started.

    Before the start, LlamaGen runs the discriminator with weight 0. Here it is not run: weight 0 gives no gradient, and
    the statistics of its BatchNorm are never used.
    """

    def __init__(
        self, model: VQModel, lpips: LPIPS | None, discriminator: PatchDiscriminator | None, config: TokenizerConfig
    ) -> None:
        super().__init__()
        self.model, self.lpips, self.discriminator, self.config = model, lpips, discriminator, config

    def forward(self, batch: ImageBatch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Total loss, and its parts without their weights."""
        pixels = batch.pixels.to(next(self.model.parameters()).device)
        reconstruction, quantized = self.model(pixels)
        parts = {
            "squared_error": F.mse_loss(reconstruction.float(), pixels),
            "codebook_loss": quantized.codebook_loss,
            "commitment_loss": quantized.commitment_loss,
        }
        weights = {"commitment_loss": self.config.commitment_weight}
        if self.lpips is not None:
            parts["lpips"] = self.lpips(reconstruction, pixels).mean()
            weights["lpips"] = self.config.lpips_weight
        logits: dict[str, Tensor] = {}
        if self.discriminator is not None and batch.adversarial:
            real, fake = self.discriminator(pixels), self.discriminator(reconstruction.detach())
            parts["generator_loss"] = generator_loss(judge_frozen(self.discriminator, reconstruction))
            parts["discriminator_loss"] = discriminator_loss(real, fake)
            weights |= dict.fromkeys(("generator_loss", "discriminator_loss"), self.config.adversarial_weight)
            logits = {"logits_real": real.mean(), "logits_fake": fake.mean()}
        loss = torch.stack([weights.get(name, 1.0) * part for name, part in parts.items()]).sum()
        if self.discriminator is not None and not batch.adversarial:
            loss = loss + _no_gradient(self.discriminator)
        scalars = parts | logits | {"codebook_usage": self.model.quantize.codebook_usage()}
        return loss, {name: scalar.detach() for name, scalar in scalars.items()}


def _no_gradient(module: nn.Module) -> Float[Tensor, ""]:
    """Zero, with a zero gradient for every parameter: DistributedDataParallel waits for a gradient of each."""
    return torch.stack([parameter.sum() for parameter in module.parameters()]).sum() * 0.0
