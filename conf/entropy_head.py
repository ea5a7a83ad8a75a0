"""Settings of stage `entropy_head`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from conf.section import Section, Seed, TrainingConfig

HeadChoice = Literal["none", "linear", "mlp", "block"]


class EntropyHeadConfig(Section):
    """What reads entropies off the encoder of the finished model, so that sampling needs no entropy model."""

    kind: HeadChoice = Field(
        "block",
        description="A linear layer, a hidden layer before it, or a narrow causal block of its own. A head that was "
        "trained with the model, see train.entropy_head, is taken as it is.",
    )
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig(steps=20_000, learning_rate=1e-3))
    calibrated_on: PositiveInt = Field(4096, description="Training views that thresholds are chosen by, at most.")
    own_entropy_on: PositiveInt = Field(256, description="The same for the model's own entropy, which is slower.")
    batch_size: PositiveInt = Field(64, description="Views looked at together.")
    seed: Seed = 0
