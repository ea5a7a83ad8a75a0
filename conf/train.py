"""Settings of stage `train`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from conf.entropy_head import HeadChoice
from conf.section import NOT_IN_KEY, Probability, Section, Seed, TrainingConfig
from conf.sizes import expand_size
from models.config import (
    DPAR_SIZES,
    GPT_SIZES,
    DPARSize,
    GPTSize,
    NextPatchSchedule,
    PositionEmbedding,
    check_position_embedding,
)


class JointHeadConfig(Section):
    """An entropy head that learns together with the model. Without one, stage `entropy_head` trains it afterwards."""

    kind: HeadChoice = Field("none", description="Kind of the head, see entropy_head.kind.")
    weight: float = Field(1.0, gt=0, description="Weight of the head's squared error beside the tokens' cross-entropy.")
    stop_gradient: bool = Field(
        True,
        description="Whether the head's loss stops before the encoder: the model then equals one without a head, bit "
        "for bit.",
    )

    def key_fields(self) -> dict[str, Any]:
        """Without a head nothing else matters."""
        return {"kind": "none"} if self.kind == "none" else super().key_fields()


class TrainConfig(Section):
    """The class-conditional model."""

    family: Literal["dpar", "llamagen", "npp"] = Field(
        "dpar", description="DPAR on patches, or a rival on tokens: LlamaGen, or LlamaGen trained by NPP."
    )
    model: DPARSize | GPTSize = Field(
        default_factory=lambda: DPAR_SIZES["B"],
        description="A name (B, L, XL …) or the size itself; of DPAR's, a rival takes the width and all layers.",
    )
    source: Literal["train", "checkpoint"] = Field("train", description="Train, or import LlamaGen's released weights.")
    checkpoint: Path | None = Field(
        None,
        description="Weights to import, a LlamaGen .pt or safetensors; not read when training.",
        json_schema_extra=NOT_IN_KEY,
    )
    position_embedding: PositionEmbedding = Field(
        "dynamic", description="Positions of the global stack (paper, section 3.3)."
    )
    npp: NextPatchSchedule = Field(
        default_factory=NextPatchSchedule,
        description="Schedule of Next Patch Prediction: from blocks of tokens to single ones.",
    )
    entropy_head: JointHeadConfig = Field(
        default_factory=JointHeadConfig, description="Head that learns with the model."
    )
    training: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(steps=1_500_000), description="Training of the model."
    )
    dropout: Probability = Field(0.1, description="Dropout probability; DPAR has dropout in its global stack only.")
    class_dropout_prob: Probability = Field(0.1, description="Share of samples trained without their class, for CFG.")
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _named_size(cls, data: Any) -> Any:
        family = data.get("family", "dpar") if isinstance(data, dict) else "dpar"
        return expand_size(data, DPAR_SIZES if family == "dpar" else GPT_SIZES)

    @field_validator("model")
    @classmethod
    def _rival(cls, model: DPARSize | GPTSize, info: ValidationInfo) -> DPARSize | GPTSize:
        """So that the family alone has to be changed to get the model that a DPAR is held against."""
        rival = info.data.get("family", "dpar") != "dpar"
        return model.as_gpt() if rival and isinstance(model, DPARSize) else model

    @model_validator(mode="after")
    def _fits_family(self) -> Self:
        if self.family == "dpar":
            if not isinstance(self.model, DPARSize):
                raise ValueError("train.model is a GPTSize and train.family dpar, expected a DPARSize")
            check_position_embedding(self.model.dim, self.model.num_heads, self.position_embedding)
        if self.source == "checkpoint" and (self.family == "dpar" or self.checkpoint is None):
            raise ValueError(
                f"train.source is checkpoint, train.family {self.family} and train.checkpoint {self.checkpoint}, "
                "expected family llamagen or npp and LlamaGen's weights, e.g. c2i_B_256.pt"
            )
        return self

    @model_validator(mode="after")
    def _head_has_its_encoder(self) -> Self:
        if self.entropy_head.kind != "none" and self.training.ema_decay is not None:
            raise ValueError(
                f"train.entropy_head.kind is {self.entropy_head.kind} and train.training.ema_decay "
                f"{self.training.ema_decay}, expected none of the two: the head would learn from an encoder that is "
                "not the one kept; leave it to stage entropy_head"
            )
        return self

    @model_validator(mode="after")
    def _warmup_fits_levels(self) -> Self:
        ends = [0, *self.restarts, self.training.steps]
        shortest = min(end - first for first, end in pairwise(ends))
        if self.training.warmup_steps >= shortest:
            raise ValueError(
                f"train.training.warmup_steps is {self.training.warmup_steps}, expected fewer than the {shortest} "
                f"steps of the shortest level of train.npp, which end at steps {ends[1:]}"
            )
        return self

    @property
    def restarts(self) -> tuple[int, ...]:
        """Steps at which a level of NPP begins, the first left out; none of another family."""
        return self.npp.ends(self.training.steps)[:-1] if self.family == "npp" else ()

    def unread_inputs(self, settings: Any) -> frozenset[str]:
        """Baselines read neither patches nor entropies; DPAR reads entropies only to train a head with it."""
        if self.family != "dpar":
            return frozenset({"entropy_map", "patch_index"})
        return frozenset({"entropy_map"}) if self.entropy_head.kind == "none" else frozenset()

    def key_fields(self) -> dict[str, Any]:
        """Another family's settings are in no key. Importing depends on the weights (by digest) and their shape."""
        fields = super().key_fields()
        if self.source == "checkpoint":
            return {name: fields[name] for name in ("source", "family", "model")}
        of_dpar = {"position_embedding", "entropy_head"}
        unread = {"dpar": {"npp"}, "llamagen": {"npp", *of_dpar}, "npp": of_dpar}
        return {name: value for name, value in fields.items() if name not in unread[self.family]}
