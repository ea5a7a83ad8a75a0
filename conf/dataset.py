"""Settings of stage `dataset`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from conf.places import Place
from conf.section import NOT_IN_KEY, Probability, Section

MAX_PIXELS = 178_956_970  # of the largest image that Pillow opens


class DatasetConfig(Section):
    """The images, their classes and their split."""

    source: Literal["image_folder", "imagenet_tar", "twemoji"] = Field(
        "image_folder",
        description="Layout of the images: `image_folder`, root/<class>/<image>; `imagenet_tar`, ImageNet's class "
        "tars in a tar or in a folder; `twemoji`, emoji from the installed package.",
    )
    root: Place | None = Field(
        None,
        description="Folder of the class folders or class tars, or the tar of the class tars.",
        json_schema_extra=NOT_IN_KEY,
    )
    heldout_fraction: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Share of each class that is held out from training, chosen by hash of the file name.",
    )
    max_broken_fraction: Probability = Field(
        0.01, description="Largest share of images that cannot be decoded; above it the stage fails."
    )

    max_pixels: int = Field(
        MAX_PIXELS, ge=1, le=MAX_PIXELS, description="Most pixels of an image; a larger one counts as broken."
    )

    @model_validator(mode="after")
    def _root_matches_source(self) -> Self:
        if self.source == "twemoji" and self.root is not None:
            raise ValueError(f"dataset.root is {self.root}, expected none: source twemoji finds its images itself")
        return self
