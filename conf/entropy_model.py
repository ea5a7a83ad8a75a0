"""Settings of stage `entropy_model`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from conf.section import Probability, Seed, TrainingConfig
from conf.sizes import FromFields, named_size
from conf.weights import ImportableModel
from models.config import (
    GPT_SIZES,
    GPTSize,
)


class EntropyModelConfig(ImportableModel):
    """The unconditional transformer whose uncertainty decides where patches start."""

    file_wanted: ClassVar[tuple[str, str]] = ("entropy_model", "the model.safetensors of an entropy_model artifact")

    model: Annotated[GPTSize, FromFields] = Field(
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
