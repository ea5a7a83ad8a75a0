"""Stage `tokenizer`: import VQ weights, or train them on the images.

The training loss is the sum of the squared error, VQ-VAE's codebook and commitment terms with a straight-through
gradient, LPIPS, and from a given step on an adversarial loss. Source: LlamaGen (arXiv 2406.06525), section 2.1.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from conf.runtime import RuntimeConfig
from conf.tokenizer import TokenizerConfig
from models.discriminator import PatchDiscriminator
from models.vq import VQModel
from stages.runtime.distributed import World, process_group
from stages.runtime.job import Inputs, main
from stages.runtime.randomness import Purpose, seed_torch
from stages.stores.image_index import ImageIndex
from stages.training.images import ImageBatch, ImageFiles, VQObjective
from stages.training.log import MetricLog
from stages.training.loop import Training, train_model
from stages.training.stream import Part, SampleStream
from stages.training.validation import reconstruction_scores
from stages.weights.lpips import read_lpips
from stages.weights.own import save_vq
from stages.weights.pretrained import read_vq_checkpoint, write_source

logger = logging.getLogger(__name__)


def tokenizer(config: TokenizerConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `vq.safetensors` and its config.

    The record holds reconstruction scores on held-out images. For imported weights, it also holds `source.json`, which
    says what file they came from and how it was read.
    """
    with process_group(runtime) as world:
        images = ImageFiles(ImageIndex.open(inputs["dataset"]), inputs["images"], config.image_size)
        if config.source == "checkpoint":
            model = _import(config, images, output, world)
        else:
            model = _train(config, images, output, runtime, world)
    if world.is_main:
        if config.imported is not None:
            write_source(output, config.imported, config.weights)
        save_vq(output, model)


def _import(config: TokenizerConfig, images: ImageFiles, output: Path, world: World) -> VQModel:
    """Import weights, and write their scores to the record."""
    model = read_vq_checkpoint(config.imported, config.model, config.weights).to(world.device).eval()
    with torch.inference_mode():
        scores = reconstruction_scores(model, images, world)
    MetricLog(output, 0, enabled=world.is_main).write(0, scores)
    return model


def _train(config: TokenizerConfig, images: ImageFiles, output: Path, runtime: RuntimeConfig, world: World) -> VQModel:
    seed_torch(config.seed, Purpose.WEIGHTS)
    model = VQModel(config.model)
    discriminator = PatchDiscriminator() if config.adversarial else None
    logger.info("training %s a discriminator", "without" if discriminator is None else "with")
    lpips = read_lpips(runtime.lpips_weights) if config.lpips_weight > 0 else None
    stream = SampleStream(images.index.num_train, config.training.global_batch_size, config.seed)

    def batch(step: int, part: Part) -> ImageBatch:
        return ImageBatch(images.training_pixels(stream, step, part), step >= config.adversarial_start)

    def samples(step: int, part: Part) -> dict[str, list[int]]:
        numbers, epochs = stream.samples(step, part)
        return {"images": numbers.tolist(), "epochs": epochs.tolist()}

    run = Training(
        model=model,
        objective=VQObjective(model, lpips, discriminator, config),
        batch=batch,
        data_state=lambda steps: stream.state(steps) | {"images": images.index.digest},
        validate=lambda: reconstruction_scores(model, images, world),
        config=config.training,
        seed=config.seed,
        auxiliary={} if discriminator is None else {"discriminator": discriminator},
        samples=samples,
    )
    train_model(run, output, world, runtime)
    return model.eval()


if __name__ == "__main__":
    main(tokenizer, TokenizerConfig)
