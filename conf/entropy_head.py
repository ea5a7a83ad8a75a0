"""Settings of stage `entropy_head`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from conf.section import Section, Seed, TrainingConfig

HeadChoice = Literal["none", "linear", "mlp", "block"]


class EntropyHeadConfig(Section):
    """A head that predicts entropies from the encoder of the finished model: sampling then needs no entropy model."""

    kind: HeadChoice = Field(
        "block",
        description="Kind of the head: none, a linear layer, an MLP, or a narrow causal block. A head that was trained "
        "with the model, see train.entropy_head, is used as it is.",
    )
    training: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(steps=20_000, learning_rate=1e-3), description="Training of the head."
    )
    calibrated_on: PositiveInt = Field(4096, description="Most training views to calibrate the head's threshold on.")
    own_entropy_on: PositiveInt = Field(
        256, description="Most training views to calibrate the threshold of the model's own entropy on."
    )
    batch_size: PositiveInt = Field(64, description="Views in one forward pass of the calibration.")
    seed: Seed = 0
