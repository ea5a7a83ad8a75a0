"""The sampler of finished models: tokens from the class-conditional model, pixels from the tokenizer.

A sample is a function of (seed, sample number, class). Its uniform random numbers come from a counter-based generator,
so batch size, process count and resume point do not affect it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, UInt16
from numpy.typing import NDArray
from torch import Tensor, nn

from conf.sample import SampleConfig
from conf.train import FAMILIES
from models.boundaries import Boundaries
from models.layers import Attention
from models.packed_linear import pack_linear_layers
from models.sampling import Sampling
from models.slot_attention import kernel_refusal
from models.token_sampling import SamplingOptions
from models.vq import VQModel
from stages.families import Model
from stages.images.from_tokens import images_of_tokens
from stages.images.tensors import pixels_to_float
from stages.patches.boundary_sources import load_boundaries
from stages.runtime.arrays import PixelBatch
from stages.runtime.errors import InputError
from stages.runtime.job import Inputs
from stages.runtime.progress import Progress
from stages.runtime.randomness import Purpose, stream
from stages.runtime.transfer import Download, to_device
from stages.stores.matching import require_fit, require_tokenizer
from stages.stores.tokens import TokenStore
from stages.weights.own import load_vq

logger = logging.getLogger(__name__)


class SampleBatch(TypedDict):
    """Rows of the sample store."""

    images: PixelBatch
    labels: UInt16[NDArray[np.uint16], " B"]
    tokens: UInt16[NDArray[np.uint16], "B T"]
    patch_starts: Bool[NDArray[np.bool_], "B T"]


@dataclass(frozen=True)
class Sampler:
    """Models and settings for sampling. `boundaries` is None for a model without patches."""

    config: SampleConfig
    model: Model
    vq: VQModel
    boundaries: Boundaries | None
    device: torch.device

    @classmethod
    def load(cls, config: SampleConfig, inputs: Inputs, store: TokenStore, device: torch.device) -> Sampler:
        """Load the finished models among `inputs`, and only the boundary source that the settings name.

        Raises:
            ArtifactError: An artifact is damaged, a model was trained on other tokens, or another tokenizer made them.
            InputError: The patch index or the entropies cannot give the boundaries that the settings ask for, or the
                model cannot be guided.
        """
        require_tokenizer(inputs["tokenizer"], store)
        model, vq = Model.load(inputs["train"], device), load_vq(inputs["tokenizer"], device)
        require_fit("model", model.config, inputs["train"], store)
        if config.cfg_scale > 1 and not has_null_class(model):
            raise InputError(
                f"sample.cfg_scale is {config.cfg_scale} and the model in {inputs['train']} was trained without class "
                "dropout: it has no unconditional half that guidance could compare with, set sample.cfg_scale=1"
            )
        prepare_for_sampling(model.module, config)
        warn_without_kernel(model, device)
        prepare_for_decoding(vq, config)
        if not FAMILIES[model.family].has_patches:
            return cls(config, model, vq, None, device)
        boundaries, network = load_boundaries(config, inputs, store, device)
        if network is not None:
            prepare_for_sampling(network, config)
        return cls(config, model, vq, boundaries, device)

    @property
    def rule(self) -> dict[str, Any]:
        """The boundary source, and its rule if it has one. Empty for a model without patches."""
        if self.boundaries is None:
            return {}
        rule = getattr(self.boundaries, "rule", None)
        return {"source": self.config.boundaries} | ({} if rule is None else asdict(rule))

    def sample(
        self,
        numbers: Int64[NDArray[np.int64], " B"],
        labels: Int64[NDArray[np.int64], " B"],
        prefix: Int[Tensor, "B M"] | None = None,
    ) -> SampleBatch:
        """Samples of the given numbers and classes. Each starts with the M tokens of `prefix`, if it is given."""
        return self._batch(self._sampling(numbers, labels, len(numbers), prefix).finish(), slice(None), labels)

    def sample_units(
        self,
        units: Sequence[Int64[NDArray[np.int64], " _"]],
        labels: Int64[NDArray[np.int64], " N"],
        progress: Progress,
    ) -> Iterator[tuple[int, SampleBatch]]:
        """Samples of many units, `sample.batch_size` at a time. Units come as they are finished, with their index.

        Args:
            units: Numbers of the samples of each unit.
            labels: Class of each sample, by its number.
            progress: Counts the samples that are finished.
        """
        numbers = np.concatenate(units) if units else np.empty(0, np.int64)
        if not len(numbers):
            return
        ends = np.cumsum([len(unit) for unit in units])
        sampling = self._sampling(numbers, labels[numbers], self.config.batch_size, None)
        left = [len(unit) for unit in units]
        for finished in sampling:
            progress.update(progress.done + len(finished))
            for unit in np.searchsorted(ends, finished.cpu().numpy(), side="right").tolist():
                left[unit] -= 1
                if not left[unit]:
                    rows = slice(int(ends[unit]) - len(units[unit]), int(ends[unit]))
                    yield unit, self._batch(sampling, rows, labels[units[unit]])
        usage = sampling.usage
        logger.info(
            "sampled %d images by %d batches of steps, %.0f %% full; fewer images were in flight in the last %d",
            len(numbers),
            usage.ticks,
            100 * usage.filled,
            usage.tail,
        )

    @torch.inference_mode()
    def encode(self, pixels: PixelBatch) -> Int[Tensor, "B T"]:
        """Tokens of images that have the size of the tokenised images."""
        return self.vq.encode(pixels_to_float(pixels, self.device))

    @torch.inference_mode()
    def decode(self, tokens: Int[Tensor, "B T"]) -> PixelBatch:
        """Images of tokens, at the size in the settings."""
        return images_of_tokens(self.vq, tokens, self.config.image_size)

    def _sampling(
        self,
        numbers: Int64[NDArray[np.int64], " N"],
        labels: Int64[NDArray[np.int64], " N"],
        batch: int,
        prefix: Int[Tensor, "N M"] | None,
    ) -> Sampling:
        options = SamplingOptions(
            cfg_scale=self.config.cfg_scale,
            cfg_schedule=self.config.cfg_schedule,
            cfg_interval=self.config.cfg_interval,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
        )
        classes = to_device(torch.from_numpy(labels), self.device)
        uniforms = to_device(self._uniforms(numbers), self.device)
        return self.model.sampling(classes, uniforms, options, self.boundaries, prefix, batch)

    def _batch(self, sampling: Sampling, rows: slice, labels: Int64[NDArray[np.int64], " B"]) -> SampleBatch:
        """Rows that are finished."""
        tokens = sampling.tokens[rows]
        codes, opens = Download(tokens), Download(sampling.starts[rows])
        return {
            "images": self.decode(tokens),
            "labels": labels.astype(np.uint16),
            "tokens": codes.numpy().astype(np.uint16),
            "patch_starts": opens.numpy().astype(np.bool_),
        }

    def _uniforms(self, numbers: Int64[NDArray[np.int64], " N"]) -> Float[Tensor, "N T"]:
        """Uniform numbers in [0, 1) for each sample and position, from each sample's own random stream."""
        num_tokens = self.model.config.num_tokens
        rows = [stream(self.config.seed, Purpose.TOKENS, int(number)).random(num_tokens) for number in numbers]
        return torch.from_numpy(np.stack(rows).astype(np.float32)).clamp_(max=1 - 2**-24)


def has_null_class(model: Model) -> bool:
    """Whether classes were dropped in the model's training, so that it knows the null class of guidance."""
    return getattr(model.config, "class_dropout_prob", 1.0) > 0


def warn_without_kernel(model: Model, device: torch.device) -> None:
    """Say why a GPU attends in plain torch, if it does."""
    attention = next((layer for layer in model.module.modules() if isinstance(layer, Attention)), None)
    if device.type != "cuda" or attention is None:
        return
    width = attention.wo.in_features // attention.num_heads
    if refusal := kernel_refusal(device, attention.wo.weight.dtype, width):
        logger.warning("sampling is slower than it could be: %s, so plain torch attends", refusal)


def prepare_for_decoding(vq: VQModel, config: SampleConfig) -> None:
    """Convert the decoder in place to its type in the settings.

    The encoder stays float32: it makes tokens, and rounding would change some of them. Weights keep their memory
    layout: in channels_last, an H100 decodes more slowly, because of the group norms.
    """
    if config.decoder_precision == "bfloat16":
        for part in (vq.post_quant_conv, vq.decoder):
            part.bfloat16()


def prepare_for_sampling(model: nn.Module, config: SampleConfig) -> None:
    """Convert weights in place to the type and memory layout that make sampling fast. Logits stay float32."""
    if config.precision == "bfloat16":
        model.bfloat16()
    pack_linear_layers(model)
