"""Settings of stage `tokenize`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from conf.section import Precision, Section


class TokenizeConfig(Section):
    """VQ tokens of every view of every image."""

    image_size: int = Field(256, ge=16, le=1024, description="Side of the views, pixels.")
    views: Literal["center", "flip", "ten_crop", "ten_crop_x2"] = Field(
        "ten_crop_x2", description="Views of each image: 1, 2, 10, or 20 at the crop ranges 1.1 and 1.05."
    )
    batch_size: PositiveInt = Field(64, description="Views in one forward pass of one process.")
    chunk_rows: PositiveInt = Field(8192, description="Images in one chunk of the store, the unit of resume.")
    precision: Precision = Field("float32", description="Type of the encoder's forward pass.")
