"""Settings of stage `entropy_model`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from conf.places import Place
from conf.section import NOT_IN_KEY, Probability, Section, Seed, TrainingConfig
from conf.sizes import FromFields, named_size
from models.config import (
    GPT_SIZES,
    GPTSize,
)


class EntropyModelConfig(Section):
    """The unconditional transformer whose uncertainty decides where patches start."""

    source: Literal["train", "checkpoint"] = Field(
        "train", description="Train on the tokens of the dataset, or import weights, e.g. those of another dataset."
    )
    checkpoint: Place | None = Field(
        None,
        description="Weights to import, model.safetensors of an entropy_model artifact whose tokens have the same "
        "tokenizer; not read when training.",
        json_schema_extra=NOT_IN_KEY,
    )
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

    @model_validator(mode="after")
    def _has_weights_to_import(self) -> Self:
        if self.source == "checkpoint" and self.checkpoint is None:
            raise ValueError(
                "entropy_model.source is checkpoint and entropy_model.checkpoint None, expected the model.safetensors "
                "of an entropy_model artifact"
            )
        return self

    @property
    def imported(self) -> Path | None:
        """The file that the weights are imported from; None where the model is trained."""
        return self.checkpoint if self.source == "checkpoint" else None

    def key_fields(self) -> dict[str, Any]:
        """Importing depends on the weights (by digest) and their shape."""
        fields = super().key_fields()
        return {name: fields[name] for name in ("source", "model")} if self.imported else fields
