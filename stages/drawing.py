"""Drawing images from finished models: tokens by the class-conditional model, pixels by the tokenizer.

A sample is a function of (seed, sample number, class): the uniform number behind each of its tokens comes from a
counter, so batch size, process count and resume point do not matter.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from conf.model_stages import SampleConfig
from models.boundaries import Boundaries
from models.dpar import DPAR
from models.gpt import GPT
from models.packed_linear import pack_linear_layers
from models.sampling import sample_dpar, sample_gpt
from models.token_sampling import SamplingOptions
from models.vq import VQModel
from stages.boundaries import load_boundaries, require_fit
from stages.errors import ArtifactError
from stages.images import Pixels, float_to_pixels, pixels_to_float
from stages.job import Inputs
from stages.stores.tokens import TokenStore
from stages.weights import load_model, load_vq

logger = logging.getLogger(__name__)
LABEL_STREAM, TOKEN_STREAM = 0, 1


class Drawn(TypedDict):
    """Rows of the sample store."""

    images: Pixels
    labels: npt.NDArray[np.uint16]
    tokens: npt.NDArray[np.uint16]
    patch_starts: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Drawer:
    """Everything a batch of samples is drawn with. `boundaries` are None for a model without patches."""

    config: SampleConfig
    model: GPT | DPAR
    vq: VQModel
    boundaries: Boundaries | None
    device: torch.device

    @classmethod
    def load(cls, config: SampleConfig, inputs: Inputs, store: TokenStore, device: torch.device) -> Drawer:
        """Load the finished models that `inputs` names; of those that can decide boundaries only the one that does.

        Raises:
            ArtifactError: An artifact is damaged, or a model is not of these tokens.
            InputError: The settings ask for boundaries that the patch index or the entropies cannot give.
        """
        model, vq = load_model(inputs["train"], device), load_vq(inputs["tokenizer"], device)
        ready_to_draw(model, config)
        require_fit("model", model.config, inputs["train"], store)
        if vq.config.codebook_size != store.codebook_size:
            raise ArtifactError(
                f"the tokenizer in {inputs['tokenizer']} has a codebook of {vq.config.codebook_size}, {store.location} "
                f"{store.codebook_size}: use the tokenizer that made these tokens"
            )
        if isinstance(model, GPT):
            return cls(config, model, vq, None, device)
        boundaries, network = load_boundaries(config, inputs, store, device)
        if network is not None:
            ready_to_draw(network, config)
        return cls(config, model, vq, boundaries, device)

    @torch.inference_mode()
    def draw(
        self,
        numbers: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        prefix: Int[Tensor, "B K"] | None = None,
    ) -> Drawn:
        """Samples of the given numbers and classes; their first tokens are those of `prefix`, if it is given."""
        options = SamplingOptions(
            cfg_scale=self.config.cfg_scale,
            cfg_schedule=self.config.cfg_schedule,
            cfg_interval=self.config.cfg_interval,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
        )
        classes = torch.from_numpy(labels).to(self.device)
        uniforms = self._uniforms(numbers).to(self.device)
        if isinstance(self.model, GPT):
            tokens = sample_gpt(self.model, classes, uniforms, options, prefix)
            starts = torch.ones_like(tokens, dtype=torch.bool)
        else:
            assert self.boundaries is not None  # `load` makes them for every DPAR
            tokens, starts = sample_dpar(self.model, classes, uniforms, options, self.boundaries, prefix)
        return {
            "images": self.decode(tokens),
            "labels": labels.astype(np.uint16),
            "tokens": tokens.cpu().numpy().astype(np.uint16),
            "patch_starts": starts.cpu().numpy(),
        }

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Int[Tensor, "B T"]:
        """Tokens of images (B, H, W, 3) of the size that was tokenised."""
        return self.vq.encode(pixels_to_float(pixels).to(self.device))

    @torch.inference_mode()
    def decode(self, tokens: Int[Tensor, "B T"]) -> Pixels:
        """Images (B, H, W, 3) of tokens, at the size of the settings."""
        return float_to_pixels(resize(self.vq.decode(tokens), self.config.image_size))

    def _uniforms(self, numbers: npt.NDArray[np.int64]) -> Float[Tensor, "B T"]:
        """One number in [0, 1) for each (sample, position), from the sample's own counter-based stream."""
        num_tokens = self.model.config.num_tokens
        rows = [stream(self.config.seed, TOKEN_STREAM, int(number)).random(num_tokens) for number in numbers]
        return torch.from_numpy(np.stack(rows).astype(np.float32)).clamp_(max=1 - 2**-24)


def ready_to_draw(model: nn.Module, config: SampleConfig) -> None:
    """Bring weights into the type and order that make steps fast. Logits are float32 whatever the type."""
    if config.precision == "bfloat16":
        model.bfloat16()
    pack_linear_layers(model)


def stream(seed: int, purpose: int, number: int) -> np.random.Generator:
    """A generator of its own for each (seed, purpose, number)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose << 56 | number], dtype=np.uint64)))


def resize(images: Float[Tensor, "B 3 h w"], size: int) -> Float[Tensor, "B 3 H W"]:
    """Decoded images at the evaluation size: bicubic without antialiasing on floats, as LlamaGen evaluates 384 px."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images.float(), size=(size, size), mode="bicubic")
