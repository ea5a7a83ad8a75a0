"""Settings of stage `entropy_model`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from conf.section import Probability, Section, Seed, TrainingConfig
from conf.sizes import expand_size
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
        default_factory=lambda: TrainingConfig(steps=1_500_000), description="Training of the model."
    )
    dropout: Probability = Field(0.1, description="Dropout probability in the transformer's layers.")
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _named_size(cls, data: Any) -> Any:
        return expand_size(data, GPT_SIZES)
