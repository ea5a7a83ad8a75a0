"""What all sections of the settings share, and the settings of every training."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

# Of a place: what lies there enters the key by its digest. Of a habit, as how often to log: it changes no result.
NOT_IN_KEY: dict[str, Any] = {"in_key": False}
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["float32", "bfloat16"]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="Seed of every random number of this stage.")]


class Section(BaseModel):
    """Base of all sections: unknown settings are errors, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    def unread_inputs(self, settings: Any) -> frozenset[str]:
        """Stages among the inputs that are left unread under all `settings`, of which this is one section."""
        return frozenset()

    def key_fields(self) -> dict[str, Any]:
        """The settings that decide what the stage makes, ready for canonical JSON."""
        fields = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("in_key") is False:
                del fields[name]
            elif isinstance(value, Section):
                fields[name] = value.key_fields()
        return fields


class TrainingConfig(Section):
    """Optimisation of one model. Progress is counted in optimiser steps; the batch is the global one."""

    steps: PositiveInt = Field(description="Optimiser steps.")
    global_batch_size: PositiveInt = Field(256, description="Images per optimiser step, over all processes.")
    learning_rate: float = Field(1e-4, gt=0, le=1)
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from zero.")
    decay: Literal["constant", "cosine", "linear_tail"] = Field(
        "constant", description="Learning rate after the warm-up: to zero, or over the last fifth down to a tenth."
    )
    betas: tuple[Probability, Probability] = Field((0.9, 0.95), description="AdamW betas.")
    weight_decay: float = Field(0.05, ge=0, description="On tensors of two and more dimensions only.")
    grad_clip: float = Field(1.0, gt=0, description="Largest global gradient norm.")
    ema_decay: float | None = Field(
        None, ge=0, lt=1, description="Keep the moving average of weights with this decay a step; null keeps the last."
    )
    precision: Precision = Field("bfloat16", description="Autocast type of the forward pass; weights stay float32.")
    checkpoint_every: PositiveInt = Field(5000, description="Steps between checkpoints.", json_schema_extra=NOT_IN_KEY)
    log_every: PositiveInt = Field(
        100, description="Steps between lines of metrics.jsonl.", json_schema_extra=NOT_IN_KEY
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, expected fewer than steps ({self.steps})")
        return self
