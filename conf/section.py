"""What all sections of the settings share, and the settings of every training."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, Strict, model_validator

# Not in the key: paths (their content digest is) and settings without effect on results.
NOT_IN_KEY: dict[str, Any] = {"in_key": False}
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["float32", "bfloat16"]
Seed = Annotated[
    int, Field(ge=0, lt=2**63, description="Seed of the stage's random numbers; unset or null takes the run's `seed`.")
]


class Section(BaseModel):
    """Base of all sections. Unknown settings and values of another kind are errors; values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _null_seed(cls, data: Any) -> Any:
        """A seed of null is a seed that is not set."""
        if isinstance(data, dict) and data.get("seed", 0) is None:
            return {name: value for name, value in data.items() if name != "seed"}
        return data

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
    """Optimisation of one model. Progress is counted in optimiser steps."""

    steps: PositiveInt = Field(description="Optimiser steps in all.")
    global_batch_size: PositiveInt = Field(256, description="Images per optimiser step, over all processes.")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Learning rate after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps in which the learning rate rises linearly from zero.")
    decay: Literal["constant", "cosine", "linear_tail"] = Field(
        "constant",
        description="Learning rate after the warm-up: `constant`; `cosine`, down to zero; or NPP's `linear_tail`, down "
        "to a tenth over the last fifth of the steps, after a warm-up whose first step has rate 0.",
    )
    betas: Annotated[tuple[Probability, Probability], Strict(False)] = Field(
        (0.9, 0.95), description="AdamW's decay rates of the moving averages of gradients and their squares."
    )
    weight_decay: float = Field(
        0.05, ge=0, description="AdamW's weight decay of tensors with two or more dimensions; the others have none."
    )
    grad_clip: float = Field(
        1.0, gt=0, description="Largest norm of all gradients together; larger ones are scaled down to it."
    )
    ema_decay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Decay per step of the moving average of weights that is kept; null keeps the last weights.",
    )
    precision: Precision = Field(
        "bfloat16", description="Type of the forward pass under autocast; weights stay float32."
    )
    checkpoint_every: PositiveInt = Field(
        5000, description="Steps between checkpoints, each with the held-out loss.", json_schema_extra=NOT_IN_KEY
    )
    log_every: PositiveInt = Field(
        100, description="Steps between lines of metrics.jsonl.", json_schema_extra=NOT_IN_KEY
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, expected fewer than steps ({self.steps})")
        return self
