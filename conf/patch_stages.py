"""Settings of the stages from tokens to patches: `entropy_model`, `entropy_map`, `patch_index`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from conf.section import Precision, Probability, Section, Seed, TrainingConfig
from conf.sizes import expand_size
from models.config import GPT_SIZES, GPTSize


class EntropyModelConfig(Section):
    """The unconditional transformer that says how surprising a token is."""

    model: GPTSize = Field(default_factory=lambda: GPT_SIZES["B"], description="A name (T, B, L …) or the size itself.")
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig(steps=1_500_000))
    dropout: Probability = 0.1
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _named_size(cls, data: Any) -> Any:
        return expand_size(data, GPT_SIZES)


class EntropyMapConfig(Section):
    """Next-token entropies of every stored view."""

    batch_size: PositiveInt = Field(64, description="Views in one forward pass of one process.")
    precision: Precision = Field(
        "bfloat16", description="Of the forward pass; entropies are float32 from float32 logits."
    )


class PatchIndexConfig(Section):
    """Where patches start (paper, Algorithm 1)."""

    mode: Literal["entropy", "static"] = "entropy"
    threshold: float | None = Field(None, description="A token above this entropy, in nats, opens a patch.")
    target_mean_length: float | None = Field(
        None, ge=1.0, description="Instead of a threshold: find the one that gives this mean patch length."
    )
    static_length: float | None = Field(None, ge=1.0, description="Tokens in a static patch; may be fractional.")
    max_length: PositiveInt | None = Field(4, description="Longest patch, tokens; null for no limit.")
    row_boundary: bool = Field(True, description="Open a patch at the start of each row of the token grid.")

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        given = {name: getattr(self, name) for name in ("threshold", "target_mean_length", "static_length")}
        wanted = {"entropy": ("threshold", "target_mean_length"), "static": ("static_length",)}[self.mode]
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1 or named[0] not in wanted:
            raise ValueError(
                f"patch_index.mode {self.mode} was given {', '.join(named) or 'nothing'}, "
                f"expected exactly one of {', '.join(wanted)}"
            )
        return self
