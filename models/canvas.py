"""The images of a sampler: their classes, random numbers and tokens, and how a step's logits become the next token.

Source: LlamaGen (arXiv 2406.06525) for classifier-free guidance, whose unconditional half has the null class.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from models.guidance import guidance_scale
from models.token_sampling import SamplingOptions, sample_token


class Canvas:
    """Tokens of N images that are sampled one by one, with the classes and random numbers that decide them.

    One more image than there are, number N, takes what is written for rows without an image. Steps may write to one
    position after the last.

    Attributes:
        tokens: (N + 1, T + 1).
        starts: Where patches start, (N + 1, T + 1).
        kept: Tokens of the prefix, which every image has.
    """

    def __init__(
        self,
        labels: Int[Tensor, " N"],
        uniforms: Float[Tensor, "N T"],
        options: SamplingOptions,
        null: int,
        prefix: Int[Tensor, "N M"] | None,
    ) -> None:
        """Blank images, which start with the tokens of `prefix` if it is given. `null` is the null class.

        Raises:
            ValueError: The prefix is for another number of images, or longer than an image.
        """
        self.num_images, self.num_tokens = uniforms.shape
        self._options, self._null = options, null
        self._labels = torch.cat([labels, labels.new_full((1,), null)])
        self._uniforms = torch.cat([uniforms, uniforms.new_zeros(1, self.num_tokens)])
        self._scales = self._guidance(uniforms.device)
        shape = (self.num_images + 1, self.num_tokens + 1)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=uniforms.device)
        self.starts = torch.zeros(shape, dtype=torch.bool, device=uniforms.device)
        self.kept = 0
        if prefix is not None:
            self.kept = prefix.shape[1]
            if len(prefix) != self.num_images or self.kept > self.num_tokens:
                raise ValueError(f"prefix is {tuple(prefix.shape)}, expected ({self.num_images}, 0..{self.num_tokens})")
            self.tokens[:-1, : self.kept] = prefix

    @property
    def halves(self) -> int:
        """Rows of an image in a step of a class-conditional stack: 2 with guidance."""
        return 2 if self._options.guided else 1

    def classes(self, images: Int[Tensor, " R"]) -> Int[Tensor, " R2"]:
        """Classes of images, with guidance followed by as many null classes."""
        labels = self._labels[images]
        return torch.cat([labels, torch.full_like(labels, self._null)]) if self._options.guided else labels

    def twice(self, rows: Shaped[Tensor, " R ..."]) -> Shaped[Tensor, " R2 ..."]:
        """Rows for both halves of a guided batch."""
        return torch.cat([rows, rows]) if self._options.guided else rows

    def conditional(self, logits: Float[Tensor, "R2 V"]) -> Float[Tensor, "R V"]:
        """Logits of the images' classes."""
        return logits[: len(logits) // self.halves]

    def draw(
        self, logits: Float[Tensor, "R2 V"], images: Int[Tensor, " R"], positions: Int[Tensor, " R"]
    ) -> Int[Tensor, " R"]:
        """Draw the tokens at some positions, or take them from the prefix. Keeps and returns them."""
        tokens = sample_token(self._guided(logits, positions), self._uniforms[images, positions], self._options)
        if self.kept:
            tokens = torch.where(positions < self.kept, self.tokens[images, positions], tokens)
        self.tokens[images, positions] = tokens
        return tokens

    def _guided(self, logits: Float[Tensor, "R2 V"], positions: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """Unconditional logits plus the scale times the difference."""
        if self._scales is None:
            return logits
        conditional, unconditional = logits.chunk(2)
        scales = self._scales[positions][:, None]
        guided = unconditional + scales * (conditional - unconditional)
        return torch.where(scales == 1.0, conditional, guided)

    def _guidance(self, device: torch.device) -> Float[Tensor, " T"] | None:
        """Scale of the guidance at each position; None without guidance."""
        o = self._options
        if not o.guided:
            return None
        scales = [
            guidance_scale(position, self.num_tokens, o.cfg_scale, o.cfg_schedule, o.cfg_interval)
            for position in range(self.num_tokens)
        ]
        return torch.tensor(scales, device=device)
