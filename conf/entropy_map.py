"""Settings of stage `entropy_map`."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from conf.section import Precision, Section


class EntropyMapConfig(Section):
    """Next-token entropies of every stored view."""

    batch_size: PositiveInt = Field(64, description="Views in one forward pass of one process.")
    precision: Precision = Field(
        "bfloat16", description="Type of the forward pass; entropies are computed in float32 from float32 logits."
    )
