"""Stage `tokenizer`: import the VQ weights, or train them on the images.

Training minimises squared error, the codebook and commitment terms of VQ-VAE with a straight-through gradient, and
LPIPS. Source: LlamaGen (arXiv 2406.06525), section 2.1.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from conf.schema import RuntimeConfig, TokenizerConfig
from models.lpips import LPIPS
from models.vq import VQModel
from stages.artifact import write_json
from stages.distributed import World, process_group
from stages.foreign_weights import read_lpips, read_vq_checkpoint
from stages.images import Pixels, center_crop, decode, float_to_pixels, pixels_to_float, random_crop
from stages.job import Inputs, main
from stages.stores.files import ImageIndex
from stages.training.loop import Training, train_model
from stages.training.stream import SampleStream
from stages.weights import save_vq

logger = logging.getLogger(__name__)
_VALIDATION_IMAGES = 512


def tokenizer(config: TokenizerConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `vq.safetensors`, its config and its reconstruction scores on held-out images."""
    with process_group(runtime) as world:
        images = ImageFiles(ImageIndex.open(inputs["dataset"]), inputs["images"], config.image_size)
        if config.source == "checkpoint":
            model = read_vq_checkpoint(config.checkpoint, config.model).to(world.device).eval()
            metrics = reconstruction_scores(model, images, world)
        else:
            model, metrics = _train(config, images, output, runtime, world)
        if world.is_main:
            save_vq(output, model)
            write_json(output / "metrics.json", metrics)


class VQObjective(nn.Module):
    """Loss of a batch of images in [-1, 1]."""

    def __init__(self, model: VQModel, lpips: LPIPS | None, config: TokenizerConfig) -> None:
        super().__init__()
        self.model, self.lpips, self.config = model, lpips, config

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its parts."""
        pixels = pixels.to(next(self.model.parameters()).device)
        reconstruction, quantized = self.model(pixels)
        squared = F.mse_loss(reconstruction.float(), pixels)
        loss = squared + quantized.codebook_loss + self.config.commitment_weight * quantized.commitment_loss
        used = torch.bincount(quantized.tokens.flatten(), minlength=self.config.model.codebook_size) > 0
        parts = {
            "squared_error": squared.detach(),
            "commitment_loss": quantized.commitment_loss.detach(),
            "codebook_usage": used.float().mean(),
        }
        if self.lpips is not None:
            distance = self.lpips(reconstruction, pixels).mean()
            loss = loss + self.config.lpips_weight * distance
            parts["lpips"] = distance.detach()
        return loss, parts


@dataclass(frozen=True)
class ImageFiles:
    """The images of an index, as pixels. Decoding is spread over threads: Pillow lets go of the interpreter lock."""

    index: ImageIndex
    root: Path
    size: int

    def training_batch(self, stream: SampleStream, step: int, world: World) -> Float[Tensor, "B 3 H W"]:
        """Random crops and mirror images of this process's share of a step."""
        images, epochs = stream.rank_slice(step, world)

        def crop(image: np.int64, epoch: np.int64) -> Pixels:
            generator = np.random.default_rng([stream.seed, int(epoch), int(image)])
            return random_crop(self._decode(image), self.size, generator)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return pixels_to_float(np.stack(list(pool.map(crop, images, epochs))))

    def center_batches(self, rows: npt.NDArray[np.int64], batch_size: int) -> Iterator[Pixels]:
        """Center crops of the given rows, (B, H, W, 3) uint8."""
        for first in range(0, len(rows), batch_size):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                yield np.stack(list(pool.map(self._center, rows[first : first + batch_size])))

    def _center(self, image: np.int64) -> Pixels:
        return center_crop(self._decode(image), self.size)

    def _decode(self, image: np.int64) -> Image.Image:
        return decode(self.index.read(self.root, int(image)))


def reconstruction_scores(model: VQModel, images: ImageFiles, world: World) -> dict[str, float]:
    """PSNR in dB and codebook usage on held-out images (on training images when none are held out)."""
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


def _train(
    config: TokenizerConfig, images: ImageFiles, output: Path, runtime: RuntimeConfig, world: World
) -> tuple[VQModel, dict[str, float]]:
    torch.manual_seed(config.seed)
    model = VQModel(config.model)
    lpips = read_lpips(runtime.lpips_weights) if config.lpips_weight > 0 else None
    stream = SampleStream(images.index.num_train, config.training.global_batch_size, config.seed)
    run = Training(
        model=model,
        objective=VQObjective(model, lpips, config),
        batch=lambda step: images.training_batch(stream, step, world),
        data_state=lambda steps: stream.state(steps) | {"images": images.index.digest},
        validate=lambda: reconstruction_scores(model, images, world),
        config=config.training,
        seed=config.seed,
    )
    metrics = train_model(run, output, world)
    return model.eval(), metrics


if __name__ == "__main__":
    main(tokenizer, TokenizerConfig)
