"""Settings of stage `evaluate`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from conf.places import Place
from conf.section import NOT_IN_KEY, Section, Seed


class EvaluateConfig(Section):
    """Scores of the samples against the training images."""

    extractor: Literal["lite0", "inception"] = Field(
        "lite0",
        description="Network that computes features: EfficientNet-Lite0 from the demo packages, or FID's Inception "
        "from a weights file.",
    )
    weights: Place | None = Field(
        None, description="Weights file of the Inception network.", json_schema_extra=NOT_IN_KEY
    )
    input_size: int = Field(
        224, ge=64, le=512, description="Side that images are resized to for EfficientNet-Lite0, pixels."
    )
    batch_size: PositiveInt = Field(64, description="Images in one forward pass of one process.")
    max_reference: PositiveInt | None = Field(
        None, description="Most reference images; null takes all training images."
    )
    neighbours: PositiveInt = Field(3, description="Neighbours k of precision and recall.")
    compared: PositiveInt = Field(
        10_000, description="Most reference images that precision and recall use; their cost is quadratic."
    )
    ladder: bool = Field(
        True, description="Whether held-out images, reconstructions, marginals and random tokens are scored too."
    )
    seed: Seed = 0

    def unread_inputs(self, settings: Any) -> frozenset[str]:
        """Tokens are read for the ladder alone."""
        return frozenset() if self.ladder else frozenset({"tokenizer", "tokenize"})

    @model_validator(mode="after")
    def _weights_match(self) -> Self:
        if (self.extractor == "inception") != (self.weights is not None):
            raise ValueError(
                f"evaluate.extractor is {self.extractor} and evaluate.weights is {self.weights}, expected a weights "
                "file with inception and none with lite0"
            )
        return self
