"""Settings of stage `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from conf.section import NOT_IN_KEY, Section, Seed


class EvaluateConfig(Section):
    """Scores of the samples against the training images."""

    extractor: Literal["lite0", "inception"] = Field(
        "lite0", description="EfficientNet-Lite0 from the demo packages, or the FID Inception from a weights file."
    )
    weights: Path | None = Field(None, description="Inception weights file.", json_schema_extra=NOT_IN_KEY)
    input_size: int = Field(224, ge=64, le=512, description="Side that images are resized to for EfficientNet-Lite0.")
    batch_size: PositiveInt = 64
    max_reference: PositiveInt | None = Field(None, description="At most this many reference images; null takes all.")
    neighbours: PositiveInt = Field(3, description="k of precision and recall.")
    compared: PositiveInt = Field(
        10_000, description="Reference images that precision and recall look at, at most; their cost is quadratic."
    )
    ladder: bool = Field(True, description="Also score held-out images, reconstructions, marginals and random tokens.")
    seed: Seed = 0

    def unread_inputs(self, settings: Any) -> frozenset[str]:
        """Only the rungs of the ladder are made from tokens."""
        return frozenset() if self.ladder else frozenset({"tokenizer", "tokenize"})

    @model_validator(mode="after")
    def _weights_match(self) -> Self:
        if (self.extractor == "inception") != (self.weights is not None):
            raise ValueError(
                f"evaluate.extractor is {self.extractor} and evaluate.weights is {self.weights}, expected a weights "
                "file with inception and none with lite0"
            )
        return self
