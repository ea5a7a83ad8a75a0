"""Settings of stage `sample`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, Strict, model_validator

from conf.boundary_sources import BOUNDARY_SOURCES, BoundarySource
from conf.section import Precision, Section, Seed
from models.guidance import Schedule


class SampleConfig(Section):
    """Images sampled from the finished model."""

    num_samples: PositiveInt = Field(50_000, description="Images to sample.")
    labels: Literal["uniform", "balanced", "data"] = Field(
        "uniform",
        description="Classes of the samples: random, the same number of each, or in the shares of the training images.",
    )
    cfg_scale: float = Field(2.0, ge=1.0, description="Scale of classifier-free guidance; 1 turns it off.")
    cfg_schedule: Schedule = Field(
        "constant", description="Scale over an image: constant, or linear from 1 at the first token to cfg_scale."
    )
    cfg_interval: Annotated[tuple[NonNegativeInt, PositiveInt], Strict(False)] | None = Field(
        None, description="Tokens of an image that are guided, [first, last + 1]; null guides all."
    )
    temperature: float = Field(1.0, gt=0, description="Divisor of the logits.")
    top_k: int = Field(0, ge=0, description="Most likely tokens that are kept; 0 keeps all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Probability that the most likely tokens kept add up to; 1 keeps all."
    )
    boundaries: BoundarySource | None = Field(
        None,
        description="What decides where patches start; null resolves to the entropy head if there is one, else to the "
        "entropy model. Models trained on static patches accept only `static`, baselines nothing.",
    )
    threshold: float | None = Field(
        None, description="Threshold of boundaries in samples, nats; null takes the source's own."
    )
    target_mean_length: float | None = Field(
        None,
        ge=1.0,
        description="Mean patch length on training images, tokens, to find the threshold for; instead of one.",
    )
    max_length: PositiveInt | None = Field(
        None, description="Longest patch in samples, tokens; null takes the patch index's."
    )
    batch_size: PositiveInt = Field(32, description="Samples in one batch, the unit of work and of resume.")
    image_size: int = Field(256, ge=16, le=1024, description="Side that decoded images are resized to, pixels.")
    precision: Precision = Field("bfloat16", description="Type of the model's weights; logits are float32.")
    decoder_precision: Precision = Field(
        "float32", description="Type of the tokenizer's decoder; bfloat16 is meant for GPUs and rounds pixels."
    )
    grid_columns: PositiveInt = Field(8, description="Samples of each class in grid.png.")
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
        """Artifacts of sources of boundaries other than the one chosen are not read."""
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
