"""Settings of stage `dataset`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from conf.section import NOT_IN_KEY, Probability, Section


class DatasetConfig(Section):
    """Which images there are."""

    source: Literal["image_folder", "imagenet_tar", "twemoji"] = Field(
        "image_folder",
        description="`image_folder`: root/<class>/<image>; `imagenet_tar`: ImageNet as published, class tars in a tar "
        "or in a folder, never unpacked; `twemoji`: emoji from the installed package.",
    )
    root: Path | None = Field(
        None, description="Folder of class folders (image_folder), or tar (imagenet_tar).", json_schema_extra=NOT_IN_KEY
    )
    heldout_fraction: float = Field(
        0.0, ge=0, le=0.5, description="Share of each class, by hash of the file name, that is never trained on."
    )
    max_broken_fraction: Probability = Field(
        0.01, description="Above this share of undecodable images the stage fails."
    )

    @model_validator(mode="after")
    def _root_matches_source(self) -> Self:
        if self.source == "twemoji" and self.root is not None:
            raise ValueError(f"dataset.root is {self.root}, expected none: source twemoji finds its images itself")
        return self
