"""Sizes of all models, as frozen dataclasses. Nothing here imports torch.

A *size* holds what the user chooses: width and depth. A *config* is a size plus what the data decides: codebook, number
of tokens, classes. Settings hold sizes. An artifact with weights holds the config.

Source of the named sizes: LlamaGen (arXiv 2406.06525), table 1; DPAR (arXiv 2512.21867), table 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

PositionEmbedding = Literal["dynamic", "dynamic_no_redundancy", "patch_index_1d"]

SMALLEST_JUDGED_IMAGE = 24  # pixels along a side; the discriminator has no logit for smaller images

_FORBID_UNKNOWN: dict[str, str] = {"extra": "forbid"}  # read by pydantic when a size is part of the settings


def _grid(num_tokens: int) -> int:
    grid = round(max(num_tokens, 0) ** 0.5)
    if grid < 1 or grid * grid != num_tokens:
        raise ValueError(f"num_tokens is {num_tokens}, expected a square number: images are square token grids")
    return grid


def _check_heads(dim: int, num_heads: int) -> None:
    if dim < 1 or num_heads < 1 or dim % num_heads or (dim // num_heads) % 4:
        raise ValueError(
            f"dim is {dim} with {num_heads} heads, expected a head width that is a multiple of 4: "
            "2D rotary embedding rotates pairs of channels, half of them by row and half by column"
        )


def check_position_embedding(dim: int, num_heads: int, position_embedding: PositionEmbedding) -> None:
    """Check that dynamic positions can split a head's channels between one row and two columns.

    Raises:
        ValueError: The head width is not a multiple of 16.
    """
    if position_embedding != "patch_index_1d" and (dim // num_heads) % 16:
        raise ValueError(
            f"position_embedding is {position_embedding} and the head width {dim // num_heads} ({dim} / {num_heads} "
            "heads), expected a multiple of 16 for dynamic position embeddings, or patch_index_1d"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VQConfig:
    """VQ tokenizer of LlamaGen. The defaults are VQ-16: downsampling 16, 71,883,403 parameters."""

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID_UNKNOWN

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8

    def __post_init__(self) -> None:
        if self.channels % 32:
            raise ValueError(f"channels is {self.channels}, expected a multiple of 32: GroupNorm has 32 groups")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers is {self.channel_multipliers}, expected one number >= 1 per level")
        if not 2 <= self.codebook_size <= 65535:
            raise ValueError(f"codebook_size is {self.codebook_size}, expected 2..65535: tokens are stored as uint16")

    @property
    def downsample(self) -> int:
        """Pixels along one side of the square that one token encodes."""
        return int(2 ** (len(self.channel_multipliers) - 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTSize:
    """Width and depth of a LlamaGen transformer."""

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID_UNKNOWN

    dim: int
    num_layers: int
    num_heads: int

    def __post_init__(self) -> None:
        _check_heads(self.dim, self.num_heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class DPARSize:
    """Width of a DPAR model and the depth of its three stacks (DPAR, table 1)."""

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID_UNKNOWN

    dim: int
    num_heads: int
    encoder_layers: int
    global_layers: int
    decoder_layers: int

    def __post_init__(self) -> None:
        _check_heads(self.dim, self.num_heads)

    def as_gpt(self) -> GPTSize:
        """The LlamaGen baseline of this size: a GPT of the same width and total number of layers (DPAR, table 1)."""
        layers = self.encoder_layers + self.global_layers + self.decoder_layers
        return GPTSize(dim=self.dim, num_layers=layers, num_heads=self.num_heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTConfig:
    """LlamaGen (class-conditional) or, if `num_classes` is None, the entropy model (no class position)."""

    dim: int
    num_layers: int
    num_heads: int
    codebook_size: int
    num_tokens: int
    num_classes: int | None
    dropout: float = 0.1
    class_dropout_prob: float = 0.1

    def __post_init__(self) -> None:
        _check_heads(self.dim, self.num_heads)
        _grid(self.num_tokens)

    @property
    def grid(self) -> int:
        """Tokens along one side of the image."""
        return _grid(self.num_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class DPARConfig:
    """DPAR: encoder, global and decoder stacks of one width. Dropout acts in the global stack only."""

    dim: int
    num_heads: int
    encoder_layers: int
    global_layers: int
    decoder_layers: int
    codebook_size: int
    num_tokens: int
    num_classes: int
    position_embedding: PositionEmbedding = "dynamic"
    dropout: float = 0.1
    class_dropout_prob: float = 0.1

    def __post_init__(self) -> None:
        _check_heads(self.dim, self.num_heads)
        check_position_embedding(self.dim, self.num_heads, self.position_embedding)
        _grid(self.num_tokens)

    @property
    def grid(self) -> int:
        """Tokens along one side of the image."""
        return _grid(self.num_tokens)


HeadKind = Literal["linear", "mlp", "block"]
_HEAD_WIDTH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyHeadConfig:
    """Head that predicts entropies from states of DPAR's encoder.

    Its own layers are `width` wide: as many of the model's attention heads as fit into 256 channels, at least one.
    """

    kind: HeadKind
    dim: int
    num_heads: int
    width: int
    codebook_size: int
    num_tokens: int

    @classmethod
    def of(cls, model: DPARConfig, kind: HeadKind) -> EntropyHeadConfig:
        """Config of a head for `model`."""
        head_dim = model.dim // model.num_heads
        num_heads = min(model.num_heads, max(1, _HEAD_WIDTH // head_dim))
        return cls(
            kind=kind,
            dim=model.dim,
            num_heads=num_heads,
            width=num_heads * head_dim,
            codebook_size=model.codebook_size,
            num_tokens=model.num_tokens,
        )

    @property
    def grid(self) -> int:
        """Tokens along one side of the image."""
        return _grid(self.num_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class NextPatchSchedule:
    """Schedule of Next Patch Prediction, from coarse blocks of tokens to single tokens.

    Attributes:
        levels: Number of levels. The side of the blocks halves from level to level. The last level is single tokens.
        rate: A level ends at this share of the step at which the next level ends. The last level ends the training.
        epoch_steps: Steps of an epoch. Every level but the last ends with a whole epoch, rounded down.

    Source: arXiv 2412.15321; its published recipe is two levels at rate 0.5.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID_UNKNOWN

    levels: int = 2
    rate: float = 0.5
    epoch_steps: int = 1

    def __post_init__(self) -> None:
        if not (1 <= self.levels <= 4 and 0 < self.rate < 1):
            raise ValueError(f"levels is {self.levels} and rate {self.rate}, expected 1..4 levels and 0 < rate < 1")
        if self.epoch_steps < 1:
            raise ValueError(f"epoch_steps is {self.epoch_steps}, expected at least 1")

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the blocks of each level, in tokens, largest first."""
        return tuple(2**level for level in reversed(range(self.levels)))

    def ends(self, steps: int) -> tuple[int, ...]:
        """Number of steps after which each level ends, in a training of `steps` steps."""
        earlier = (int(steps * self.rate**level) for level in reversed(range(1, self.levels)))
        return (*(end - end % self.epoch_steps for end in earlier), steps)

    def side(self, step: int, steps: int) -> int:
        """Side of the blocks, in tokens, in step `step` of `steps`, counted from 0."""
        return next(side for side, end in zip(self.sides, self.ends(steps), strict=True) if step < end)


GPT_SIZES: dict[str, GPTSize] = {
    "T": GPTSize(dim=512, num_layers=6, num_heads=8),
    "B": GPTSize(dim=768, num_layers=12, num_heads=12),
    "L": GPTSize(dim=1024, num_layers=24, num_heads=16),
    "XL": GPTSize(dim=1280, num_layers=36, num_heads=20),
    "XXL": GPTSize(dim=1536, num_layers=48, num_heads=24),
    "1B": GPTSize(dim=2048, num_layers=22, num_heads=32),
    "3B": GPTSize(dim=3200, num_layers=24, num_heads=32),
}

DPAR_SIZES: dict[str, DPARSize] = {
    "B": DPARSize(dim=768, num_heads=12, encoder_layers=1, global_layers=8, decoder_layers=3),
    "L": DPARSize(dim=1024, num_heads=16, encoder_layers=1, global_layers=19, decoder_layers=4),
    "XL": DPARSize(dim=1280, num_heads=20, encoder_layers=1, global_layers=30, decoder_layers=5),
    "XXL": DPARSize(dim=1536, num_heads=24, encoder_layers=1, global_layers=41, decoder_layers=6),
    "L-E2D3": DPARSize(dim=1024, num_heads=16, encoder_layers=2, global_layers=19, decoder_layers=3),
    "L-E3D2": DPARSize(dim=1024, num_heads=16, encoder_layers=3, global_layers=19, decoder_layers=2),
    "L-E4D1": DPARSize(dim=1024, num_heads=16, encoder_layers=4, global_layers=19, decoder_layers=1),
}
