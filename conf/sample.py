"""Settings of stage `sample`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from conf.boundary_sources import BOUNDARY_SOURCES, BoundarySource
from conf.section import Precision, Section, Seed
from models.guidance import Schedule


class SampleConfig(Section):
    """Images drawn from the finished model."""

    num_samples: PositiveInt = Field(50_000)
    labels: Literal["uniform", "balanced", "data"] = Field(
        "uniform", description="Random classes, the same number of each, or the class shares of the training images."
    )
    cfg_scale: float = Field(2.0, ge=1.0, description="Classifier-free guidance; 1 is none.")
    cfg_schedule: Schedule = Field("constant", description="Or from 1 at an image's first token to cfg_scale.")
    cfg_interval: tuple[NonNegativeInt, PositiveInt] | None = Field(
        None, description="Only these tokens of an image are guided: [first, last + 1]; null guides all."
    )
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0, description="Keep the k likeliest tokens; 0 keeps all.")
    top_p: float = Field(1.0, gt=0, le=1)
    boundaries: BoundarySource | None = Field(
        None,
        description="What decides where patches start; null resolves to the entropy head if there is one, else to the "
        "entropy model. Models trained on static patches accept only `static`, baselines nothing.",
    )
    threshold: float | None = Field(None, description="Boundary threshold at sampling; null takes the source's own.")
    target_mean_length: float | None = Field(
        None, ge=1.0, description="Instead of it: the threshold that gives this mean length on the training images."
    )
    max_length: PositiveInt | None = Field(None, description="Longest patch at sampling; null takes the patch index's.")
    batch_size: PositiveInt = Field(32, description="Samples drawn together: the unit of work and of resume.")
    image_size: int = Field(256, ge=16, le=1024, description="Side of the stored images; decoded images are resized.")
    precision: Precision = Field("bfloat16", description="Of the weights that draw; logits are float32.")
    grid_columns: PositiveInt = Field(8, description="Samples a class in grid.png.")
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.threshold is not None and self.target_mean_length is not None:
            raise ValueError(
                f"sample.threshold is {self.threshold} and sample.target_mean_length {self.target_mean_length}, "
                "expected at most one of them"
            )
        if self.cfg_interval is not None and self.cfg_interval[0] >= self.cfg_interval[1]:
            raise ValueError(f"sample.cfg_interval is {list(self.cfg_interval)}, expected [first, last + 1]")
        return self

    def unread_inputs(self, settings: Any) -> frozenset[str]:
        """What decides boundaries is read, and nothing else of what could decide them."""
        decides = set[str]()
        if self.boundaries is not None:
            source = BOUNDARY_SOURCES[self.boundaries]
            decides = {"patch_index"} | source.reads
            if self.target_mean_length is not None:
                decides |= source.reads_for_target
        return frozenset({"entropy_model", "entropy_map", "patch_index", "entropy_head"} - decides)

    @property
    def own_rule(self) -> dict[str, float]:
        """The settings given that change the patch index's rule."""
        given = {name: getattr(self, name) for name in ("threshold", "target_mean_length", "max_length")}
        return {name: value for name, value in given.items() if value is not None}
