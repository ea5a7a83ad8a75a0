"""Memory of a stage on its device and on the host, in closed form.

Training: parameters, gradients and AdamW's moments in float32, and under bfloat16 the cast weights; then what a forward
pass saves for the backward pass, which grows with the images of a micro-batch. The tests hold the saved bytes to those
of the real modules. Sampling: weights and caches, and decoding of the images.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import Settings
from conf.section import TrainingConfig
from models.config import DPARSize, GPTSize, VQConfig
from pipeline.budget.disk import MOMENTS, WEIGHT
from pipeline.budget.parameters import num_layers, transformer_parameters, vq_parameters
from pipeline.budget.shape import Shape, TokenShape, model_size
from pipeline.graph import STAGES
from stages.images.limits import DECODED_PIXELS

# Bytes saved for the backward pass, counted on the real modules.
_BLOCK_BYTES = {"bfloat16": 55, "float32": 76}  # a row and channel of a block
_ENDS_BYTES = {"bfloat16": 7, "float32": 9}  # a row and channel of embedding, last norm and head
_VQ_BYTES = {"bfloat16": 170, "float32": 205}  # a pixel and base channel
_VQ_PASS = 20  # bytes a pixel and base channel that a pass without gradients holds at once, float32
_WORKSPACE = 1.1  # gradients and temporary tensors on top of what is saved
CONTEXT = 1e9  # bytes of CUDA's context and libraries on the device
_PROCESS, _HOST_CUDA = 0.7e9, 2e9  # bytes of a stage's process on the host; more of one that uses CUDA
_LISTED = 300  # bytes of an image while it is indexed


@dataclass(frozen=True, kw_only=True)
class Training:
    """Memory of training a model on one device.

    Attributes:
        state: Bytes that do not depend on the batch.
        image: Bytes for each image of a micro-batch.
        share: Images of a step on each device.
    """

    state: float
    image: float
    share: int

    def at(self, micro_batch: int) -> float:
        """Bytes at a micro-batch."""
        return self.state + micro_batch * self.image * _WORKSPACE

    def largest(self, memory: float) -> int:
        """Largest micro-batch, a power of two or the whole share, that fits into `memory` bytes; 0 if none does."""
        return max((size for size in self.micro_batches if self.at(size) <= memory), default=0)

    @property
    def micro_batches(self) -> list[int]:
        """Powers of two below the share, and the share."""
        return [2**power for power in range(self.share.bit_length()) if 2**power < self.share] + [self.share]


def transformer_training(
    size: GPTSize | DPARSize, shape: Shape, training: TrainingConfig, *, conditional: bool, devices: int
) -> Training:
    """Memory of training LlamaGen, DPAR or an entropy model."""
    parameters = transformer_parameters(size, shape.tokens, conditional=conditional)
    saved = rows(size, shape) * size.dim * _BLOCK_BYTES[training.precision]
    logits = shape.tokens.codebook_size * _width(training.precision)  # their gradient, see models/loss.py
    ends = shape.tokens.num_tokens * (logits + size.dim * _ENDS_BYTES[training.precision])
    return Training(
        state=_state(parameters, training, devices),
        image=saved + ends,
        share=-(-training.global_batch_size // devices),
    )


def vq_training(config: VQConfig, image_size: int, training: TrainingConfig, devices: int) -> Training:
    """Memory of training a tokenizer."""
    return Training(
        state=_state(vq_parameters(config), training, devices),
        image=image_size**2 * config.channels * _VQ_BYTES[training.precision],
        share=-(-training.global_batch_size // devices),
    )


def trainings(settings: Settings, shape: Shape, devices: int) -> dict[str, Training]:
    """Memory of every training of a large model, by stage. Imported models are not trained."""
    found = dict[str, Training]()
    if settings.tokenizer.source == "train":
        config = settings.tokenizer
        found["tokenizer"] = vq_training(config.model, config.image_size, config.training, devices)
    entropy = settings.entropy_model
    if entropy.imported is None:
        found["entropy_model"] = transformer_training(
            entropy.model, shape, entropy.training, conditional=False, devices=devices
        )
    if settings.train.imported is None:
        found["train"] = transformer_training(
            model_size(settings), shape, settings.train.training, conditional=True, devices=devices
        )
    return found


def forwards(settings: Settings, shape: Shape) -> dict[str, float]:
    """Bytes of the other stages that use a device, at the batch sizes of the settings."""
    tokenize, entropy_map, sample = settings.tokenize, settings.entropy_map, settings.sample
    tokens, vq = shape.tokens, settings.tokenizer.model
    entropy_model, model = settings.entropy_model.model, model_size(settings)
    caches = sample.batch_size * (2 if sample.cfg_scale > 1 else 1) * cache_bytes(model, shape, sample.precision)
    sampled = transformer_parameters(model, tokens, conditional=True) * _width(sample.precision)
    found = settings.entropy_head.batch_size * cache_bytes(model, shape, "float32")
    return {
        "tokenize": _encoding(vq, tokenize.image_size, tokenize.batch_size),
        "entropy_map": _forward(entropy_model, entropy_map.batch_size, tokens, entropy_map.precision),
        "entropy_head": transformer_parameters(model, tokens, conditional=True) * WEIGHT + found,
        "sample": sampled + max(caches, _decoding(vq, tokenize.image_size, sample.batch_size)),
        "evaluate": _decoding(vq, tokenize.image_size, settings.evaluate.batch_size),
    }


def host_memory(settings: Settings, shape: Shape, processes: int, *, cuda: bool) -> dict[str, float]:
    """Bytes of host memory that the processes of each stage hold, without what models take on a CPU.

    Tokens and entropies are mapped files: they live in the page cache and are not counted.
    """
    base = processes * (_PROCESS + (_HOST_CUDA if cuda else 0))
    starts = processes * shape.num_views * shape.tokens.num_tokens / 8  # the patch index, one bit a token
    labels = processes * shape.images * 2
    held = dict.fromkeys(STAGES, base)
    held["dataset"] = _PROCESS + shape.images * _LISTED
    held["patch_index"] = _PROCESS
    held["train"] += labels + (starts if settings.train.has_patches else 0)
    held["entropy_model"] += labels
    held["entropy_head"] += labels + starts
    return held


def _encoding(config: VQConfig, image_size: int, batch: int) -> float:
    """Bytes of encoding a batch without gradients, float32."""
    return vq_parameters(config) * WEIGHT + batch * image_size**2 * config.channels * _VQ_PASS


def _decoding(config: VQConfig, image_size: int, batch: int) -> float:
    """Bytes of decoding a batch in parts, float32."""
    together = max(1, min(batch, DECODED_PIXELS // image_size**2))
    return _encoding(config, image_size, together)


def _forward(size: GPTSize, batch: int, tokens: TokenShape, precision: str) -> float:
    """Bytes of a forward pass without gradients: weights, states of a layer, and float32 logits twice."""
    states = batch * tokens.num_tokens * 8 * size.dim * _width(precision)
    logits = 2 * batch * tokens.num_tokens * tokens.codebook_size * WEIGHT
    return transformer_parameters(size, tokens, conditional=False) * WEIGHT + states + logits


def cache_bytes(size: GPTSize | DPARSize, shape: Shape, precision: str) -> float:
    """Bytes of the keys and values of one image."""
    return 2 * rows(size, shape) * size.dim * _width(precision)


def _state(parameters: int, training: TrainingConfig, devices: int) -> float:
    """Bytes of weights, gradients and moments; of the average of weights, the reduced gradients, the cast weights."""
    width = 2 * WEIGHT + MOMENTS
    width += 0 if training.ema_decay is None else WEIGHT
    width += WEIGHT if devices > 1 else 0
    width += 2 if training.precision == "bfloat16" else 0
    return parameters * width


def rows(size: GPTSize | DPARSize, shape: Shape) -> float:
    """Rows that the blocks of all stacks read for one image, added up."""
    num_tokens = shape.tokens.num_tokens
    if isinstance(size, GPTSize):
        return num_tokens * num_layers(size)
    patches = (num_tokens - 1) / shape.mean_length + 1
    return size.encoder_layers * (num_tokens - 1) + size.global_layers * patches + size.decoder_layers * num_tokens


def _width(precision: str) -> int:
    """Bytes of a number."""
    return 2 if precision == "bfloat16" else 4
