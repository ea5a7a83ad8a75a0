"""Settings of stage `tokenizer`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from conf.section import Seed, TrainingConfig
from conf.sizes import FromFields
from conf.weights import ImportableModel
from models.config import (
    SMALLEST_JUDGED_IMAGE,
    VQConfig,
)


class TokenizerConfig(ImportableModel):
    """The VQ tokenizer: imported or trained."""

    imported_key: ClassVar[tuple[str, ...]] = ("source", "model", "image_size")  # the size that it is tried at

    source: Literal["train", "checkpoint"] = Field(
        "checkpoint", description="Import weights, or train on the images of the dataset."
    )
    model: Annotated[VQConfig, FromFields] = Field(
        default_factory=VQConfig, description="Shape of the VQ model; the default is VQ-16."
    )
    image_size: int = Field(256, ge=16, le=1024, description="Side of the training crops, pixels.")
    training: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(steps=400_000, global_batch_size=128, weight_decay=0.0),
        description="Training of the tokenizer and its discriminator.",
    )
    commitment_weight: float = Field(0.25, ge=0, description="Weight of the encoder's commitment loss.")
    lpips_weight: float = Field(
        1.0, ge=0, description="Weight of the perceptual loss; 0 leaves it out and needs no VGG weights."
    )
    adversarial_weight: float = Field(0.5, ge=0, description="Weight of the discriminator's losses; 0 trains none.")
    adversarial_start: int = Field(20_000, ge=0, description="Steps before the discriminator starts.")
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.image_size % self.model.downsample:
            raise ValueError(
                f"tokenizer.image_size is {self.image_size}, expected a multiple of {self.model.downsample}, "
                f"the downsampling of tokenizer.model.channel_multipliers {self.model.channel_multipliers}"
            )
        if self.source == "train" and self.adversarial and self.image_size < SMALLEST_JUDGED_IMAGE:
            raise ValueError(
                f"tokenizer.image_size is {self.image_size}, expected at least {SMALLEST_JUDGED_IMAGE} for the "
                "discriminator: or set tokenizer.adversarial_weight to 0"
            )
        return self

    @property
    def adversarial(self) -> bool:
        """Whether a discriminator comes in before training ends."""
        return self.adversarial_weight > 0 and self.adversarial_start < self.training.steps
