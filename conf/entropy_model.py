"""Settings of stage `entropy_model`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from conf.section import Probability, Section, Seed, TrainingConfig
from conf.sizes import named_size
from models.config import (
    GPT_SIZES,
    GPTSize,
)


class EntropyModelConfig(Section):
    """The unconditional transformer whose uncertainty decides where patches start."""

    model: GPTSize = Field(
        default_factory=lambda: GPT_SIZES["B"], description="Size of the model: a name (T, B, L …) or its numbers."
    )
    training: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(steps=1_501_200), description="Training of the model."
    )
    dropout: Probability = Field(0.1, description="Dropout probability in the transformer's layers.")
    seed: Seed = 0

    @field_validator("model", mode="before")
    @classmethod
    def _size(cls, size: Any) -> Any:
        return named_size(size, GPT_SIZES)
