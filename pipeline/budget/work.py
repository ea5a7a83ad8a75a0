"""What each stage computes: floating-point operations, sequential steps, and work of the host's CPU.

A stage consists of phases, each with one limit: the rate of matrix products, or for steps that follow each other also
launches and memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from conf.boundary_sources import BOUNDARY_SOURCES
from conf.section import TrainingConfig
from models.config import DPARConfig, DPARSize, GPTSize
from pipeline.budget.costs import Costs
from pipeline.budget.disk import WEIGHT, for_every_stage
from pipeline.budget.memory import cache_bytes
from pipeline.budget.parameters import num_layers, transformer_parameters
from pipeline.budget.phases import Phase, Work

if TYPE_CHECKING:
    from models.macs import Cost

FLOPS = 2  # operations of a multiply-accumulate

# Launches of the sampler, counted in LlamaGen-B and L, and in DPAR-B and L with the entropy head: 454, 888, 636, 1102
# operations a token.
_SAMPLER_LAYER, _SAMPLER_TOKEN, _SAMPLER_PATCHED_TOKEN = 37, 15, 190
_TRAINING_LAYER, _FORWARD_LAYER = 120, 37  # launches of a layer in a training step, and in a forward pass
_VALIDATED = 512  # images that a tokenizer is scored on

# Seconds of one core, measured on Pillow; see `pipeline.budget.check` for the stages that they are checked on.
_DECODE_S, _DECODE_MEGAPIXEL_S = 0.4e-3, 10e-3  # of an image: file and header; and pixels
_VIEW_MEGAPIXEL_S = 15e-3  # of a view: resizing, cropping, copying
_MEGAPIXELS = {"image_folder": 0.2, "imagenet_tar": 0.2, "twemoji": 72 * 72 / 1e6}  # of ImageNet; of the emoji
_TOKEN_S = 2e-9  # of a token whose entropy is read, compared and written as a bit
# MACs of the feature networks at their own input size, and that size.
_FEATURES = {"lite0": (0.4e9, 224), "inception": (5.7e9, 299)}


def _dataset(costs: Costs) -> Work:
    images = costs.shape.images
    return Work(images=images, host_s=images * _decode_s(costs))


def _tokenizer(costs: Costs) -> Work:
    config, image = costs.settings.tokenizer, costs.image
    scale = (config.image_size / costs.settings.tokenize.image_size) ** 2
    both = (image.encode + image.decode) * scale
    if config.source == "checkpoint":
        images = min(costs.shape.heldout or costs.shape.images, _VALIDATED)
        return Work(images=images, phases=(_convolutions(both * images, "float32"),))
    training = config.training
    images = training.steps * training.global_batch_size
    judged = max(0, training.steps - config.adversarial_start) / training.steps if config.adversarial else 0
    # Forward and backward of the model; of the perceptual loss twice forward and once back; of the discriminator on
    # real images, on reconstructions, and once more for the model's own loss.
    losses = 3 * image.perceptual * (config.lpips_weight > 0) + 8 * judged * image.discriminator
    each = 3 * both + losses * scale
    phase = _convolutions(costs.share(each * images), training.precision)
    host_s = images * (_decode_s(costs) + _view_s(config.image_size))
    return Work(images=images, phases=(phase,), host_s=host_s)


def _tokenize(costs: Costs) -> Work:
    config, views = costs.settings.tokenize, costs.shape.num_views
    phase = _convolutions(costs.share(costs.image.encode * views), config.precision)
    host_s = costs.shape.images * _decode_s(costs) + views * _view_s(config.image_size)
    return Work(images=views, tokens=views * costs.shape.tokens.num_tokens, phases=(phase,), host_s=host_s)


def _entropy_model(costs: Costs) -> Work:
    config = costs.settings.entropy_model
    if config.imported is None:
        return _trained(costs, costs.entropy_model, config.model, config.training)
    return _scored(costs, costs.entropy_model)


def _entropy_map(costs: Costs) -> Work:
    config, views = costs.settings.entropy_map, costs.shape.num_views
    phase = Phase(
        kind="forward",
        flops=costs.share(FLOPS * costs.entropy_model.forward.total * views),
        precision=config.precision,
        calls=costs.share(views / config.batch_size),
        launches=_FORWARD_LAYER * num_layers(costs.settings.entropy_model.model),
    )
    return Work(images=views, tokens=views * costs.shape.tokens.num_tokens, phases=(phase,))


def _patch_index(costs: Costs) -> Work:
    tokens = costs.shape.num_views * costs.shape.tokens.num_tokens
    return Work(images=costs.shape.num_views, tokens=tokens, serial_s=tokens * _TOKEN_S)


def _train(costs: Costs) -> Work:
    config = costs.settings.train
    if config.imported is None:
        return _trained(costs, costs.model, costs.size, config.training)
    return _scored(costs, costs.model)


def _scored(costs: Costs, model: Cost) -> Work:
    """Held-out loss of an imported model."""
    images = costs.shape.heldout
    phase = Phase(kind="forward", flops=costs.share(FLOPS * model.forward.total * images), precision="float32")
    return Work(images=images, tokens=images * costs.shape.tokens.num_tokens, phases=(phase,))


def _entropy_head(costs: Costs) -> Work:
    """Train the head on the frozen encoder, then find thresholds: in one process, for the head and token by token."""
    from models.macs import head_sampling

    config, size, num_tokens = costs.settings.entropy_head, costs.size, costs.shape.tokens.num_tokens
    if config.kind == "none" or not isinstance(size, DPARSize) or costs.settings.patch_index.mode == "static":
        return Work(images=0)
    encoder = costs.model.sampling.unconditional.total
    head = head_sampling(DPARConfig(**asdict(size), **asdict(costs.shape.tokens))).unconditional.total
    images = config.training.steps * config.training.global_batch_size
    known = min(config.calibrated_on, costs.shape.train_images * costs.shape.views)
    known += min(config.calibrated_on, costs.shape.heldout)
    own = min(config.own_entropy_on, costs.shape.train_images * costs.shape.views)
    own += min(config.own_entropy_on, costs.shape.heldout)
    training = Phase(
        kind="training",
        flops=costs.share(FLOPS * (encoder + 3 * head) * images),
        precision=config.training.precision,
        calls=config.training.steps,
        launches=_TRAINING_LAYER * (1 + size.encoder_layers),
    )
    calibration = Phase(kind="forward", flops=FLOPS * (encoder + head) * known, precision="float32")
    step = _sampling_step(costs, own, config.batch_size, "float32", guided=False)
    return Work(images=images, tokens=images * num_tokens, phases=(training, calibration, step))


def _sample(costs: Costs) -> Work:
    config, shape = costs.settings.sample, costs.shape
    images = costs.share(config.num_samples)
    guided = config.cfg_scale > 1
    step = _sampling_step(costs, images, config.batch_size, config.precision, guided=guided)
    decode = _convolutions(costs.image.decode * images, "float32")
    return Work(images=config.num_samples, tokens=config.num_samples * shape.tokens.num_tokens, phases=(step, decode))


def _evaluate(costs: Costs) -> Work:
    """Features of real images, which are decoded one by one, and of images decoded from tokens."""
    config, shape = costs.settings.evaluate, costs.shape
    real = shape.reference_images(costs.settings) + shape.rung_images(costs.settings)
    decoded = 3 * shape.rung_images(costs.settings)
    images = real + costs.settings.sample.num_samples + decoded
    macs, side = _FEATURES[config.extractor]
    features = macs * (config.input_size / side) ** 2 if config.extractor == "lite0" else macs
    phase = _convolutions(costs.share(features * images + costs.image.decode * decoded), "float32")
    read_s = _decode_s(costs) + _view_s(costs.settings.sample.image_size)
    return Work(images=images, phases=(phase,), serial_s=costs.share(real * read_s))


def _trained(costs: Costs, cost: Cost, size: GPTSize | DPARSize, training: TrainingConfig) -> Work:
    images = training.steps * training.global_batch_size
    phase = Phase(
        kind="training",
        flops=costs.share(FLOPS * cost.training.total * images),
        precision=training.precision,
        calls=training.steps,
        launches=_TRAINING_LAYER * num_layers(size),
    )
    return Work(images=images, tokens=images * costs.shape.tokens.num_tokens, phases=(phase,))


def _sampling_step(costs: Costs, images: float, batch: int, precision: str, *, guided: bool) -> Phase:
    """Cached sampling, token by token: every step starts many small operations, and reads all weights and the caches.

    A batch advances together, so some patch closes at nearly every token and the global stack runs for it.
    """
    num_tokens, size = costs.shape.tokens.num_tokens, costs.size
    batch = min(batch, max(1, round(images)))
    width = 2 if precision == "bfloat16" else WEIGHT
    weights = transformer_parameters(size, costs.shape.tokens, conditional=True) * width
    caches = batch * (2 if guided else 1) * cache_bytes(size, costs.shape, precision) / 2  # filled from none to all
    macs = (costs.model.sampling + costs.boundaries).macs(guided=guided)
    launches = _SAMPLER_LAYER * num_layers(size)
    launches += _SAMPLER_PATCHED_TOKEN if costs.settings.train.has_patches else _SAMPLER_TOKEN
    source = costs.settings.sample.boundaries
    if source is not None and "entropy_model" in BOUNDARY_SOURCES[source].reads:
        launches += _SAMPLER_LAYER * num_layers(costs.settings.entropy_model.model)
    return Phase(
        kind="sampling",
        flops=FLOPS * macs.total * images,
        precision=precision,
        calls=-(-images // batch) * num_tokens,
        launches=launches,
        moved=weights + caches,
    )


def _convolutions(macs: float, precision: str) -> Phase:
    return Phase(kind="convolution", flops=FLOPS * macs, precision=precision)


def _decode_s(costs: Costs) -> float:
    """Seconds of one core to read and decode an image."""
    return _DECODE_S + _DECODE_MEGAPIXEL_S * _MEGAPIXELS[costs.settings.dataset.source]


def _view_s(image_size: int) -> float:
    """Seconds of one core to make a view of a decoded image."""
    return _VIEW_MEGAPIXEL_S * image_size**2 / 1e6


WORK: dict[str, Callable[[Costs], Work]] = for_every_stage(
    {
        "dataset": _dataset,
        "tokenizer": _tokenizer,
        "tokenize": _tokenize,
        "entropy_model": _entropy_model,
        "entropy_map": _entropy_map,
        "patch_index": _patch_index,
        "train": _train,
        "entropy_head": _entropy_head,
        "sample": _sample,
        "evaluate": _evaluate,
    }
)
"""Work of each stage."""
