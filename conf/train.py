"""Settings of stage `train`: one section for each model family, chosen by `train.family`.

`stages.families` says how a family is built, trained and sampled, and `pipeline.bench.family_costs` what it costs. All
three tables have the same entries, which is checked on import.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, ModelWrapValidatorHandler, PositiveInt, field_validator, model_validator

from conf.entropy_head import HeadChoice
from conf.section import NOT_IN_KEY, Probability, Section, Seed, TrainingConfig
from conf.sizes import FromFields, gpt_size, named_size
from conf.weights import ImportableModel
from models.config import (
    DPAR_SIZES,
    GPT_SIZES,
    DPARSize,
    GPTSize,
    NextPatchSchedule,
    PositionEmbedding,
    check_position_embedding,
)

DEFAULT_FAMILY = "dpar"
_Entry = TypeVar("_Entry")


class TrainConfig(Section):
    """The class-conditional model: what every family has. Validation gives the section of the family that is named."""

    has_patches: ClassVar[bool] = False
    """Whether the model works on patches, so that something must decide where they start in samples."""

    family: str = Field(
        DEFAULT_FAMILY, description="DPAR on patches, or a baseline on tokens: LlamaGen, or LlamaGen trained by NPP."
    )
    training: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(steps=1_501_200), description="Optimisation of the model."
    )
    preview_every: PositiveInt | None = Field(
        None,
        description="Steps between pictures of samples in the record; null draws none.",
        json_schema_extra=NOT_IN_KEY,
    )
    seed: Seed = 0

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_family(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, TrainConfig) or not isinstance(data, dict):
            return handler(data)
        family = data.get("family", cls.model_fields["family"].default)
        section = FAMILIES.get(family) if isinstance(family, str) else None
        if section is None:
            raise ValueError(f"train.family is {family!r}, expected one of {', '.join(FAMILIES)}")
        if cls is TrainConfig:
            return section.model_validate(data)  # type: ignore[return-value]
        for name in data:
            if owners := _owners(name, family):
                raise ValueError(
                    f"train.{name} is set and train.family {family}, expected family {' or '.join(owners)}: "
                    f"{family} has no such setting"
                )
        return handler(data)

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
        """Steps at which the schedule of the learning rate begins anew."""
        return ()

    @property
    def imported(self) -> Path | None:
        """The file that the weights are imported from; None where the model is trained."""
        return None

    @property
    def trains_head(self) -> bool:
        """Whether an entropy head learns together with the model."""
        return False

    @property
    def can_be_guided(self) -> bool:
        """Whether a model that is trained so can be sampled with classifier-free guidance."""
        return True

    def grid_problem(self, grid: int) -> str | None:
        """Why the family cannot train on images of `grid` x `grid` tokens; None where it can."""
        return None

    def unread_inputs(self, settings: Any) -> frozenset[str]:
        """Baselines read neither patches nor entropies."""
        return frozenset({"entropy_map", "patch_index"})


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


class TransformerSettings(ImportableModel, TrainConfig):
    """What the transformers have in common: they are trained, or imported."""

    imported_key: ClassVar[tuple[str, ...]] = ("source", "family", "model")

    dropout: Probability = Field(0.1, description="Dropout probability; DPAR has dropout in its global stack only.")
    class_dropout_prob: Probability = Field(0.1, description="Share of samples trained without their class, for CFG.")

    @property
    def can_be_guided(self) -> bool:
        """Imported weights may hold the null class whatever the settings say; stage `sample` looks at them."""
        return self.class_dropout_prob > 0 or self.source == "checkpoint"


class DPARSettings(TransformerSettings):
    """DPAR on patches."""

    has_patches: ClassVar[bool] = True

    imported_key: ClassVar[tuple[str, ...]] = ("source", "family", "model", "position_embedding")
    file_wanted: ClassVar[tuple[str, str]] = ("train", "weights of DPAR, e.g. the model.safetensors of an artifact")

    family: Literal["dpar"] = Field("dpar", description="DPAR on patches.")
    model: Annotated[DPARSize, FromFields] = Field(
        default_factory=lambda: DPAR_SIZES["B"], description="A name (B, L, XL …) or the size itself."
    )
    position_embedding: PositionEmbedding = Field(
        "dynamic", description="Positions of the global stack (paper, section 3.3)."
    )
    entropy_head: JointHeadConfig = Field(
        default_factory=JointHeadConfig, description="Entropy head that learns together with the model."
    )

    @field_validator("model", mode="before")
    @classmethod
    def _size(cls, size: Any) -> Any:
        if isinstance(size, GPTSize):
            raise ValueError("train.model is a GPTSize and train.family dpar, expected a DPARSize")
        return named_size(size, DPAR_SIZES)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_position_embedding(self.model.dim, self.model.num_heads, self.position_embedding)
        if self.trains_head and self.training.ema_decay is not None:
            raise ValueError(
                f"train.entropy_head.kind is {self.entropy_head.kind} and train.training.ema_decay "
                f"{self.training.ema_decay}, expected none of the two: the head would learn from an encoder that is "
                "not the one kept; leave it to stage entropy_head"
            )
        if self.trains_head and self.source == "checkpoint":
            raise ValueError(
                f"train.entropy_head.kind is {self.entropy_head.kind} and train.source checkpoint, expected none: "
                "nothing is trained together with imported weights; leave it to stage entropy_head"
            )
        return self

    @property
    def trains_head(self) -> bool:
        """Whether an entropy head learns together with the model."""
        return self.entropy_head.kind != "none"

    def unread_inputs(self, settings: Any) -> frozenset[str]:
        """DPAR reads entropies only to train a head with it."""
        return frozenset() if self.trains_head else frozenset({"entropy_map"})


class LlamaGenSettings(TransformerSettings):
    """LlamaGen: a transformer on tokens."""

    file_wanted: ClassVar[tuple[str, str]] = ("train", "LlamaGen's weights, e.g. c2i_B_256.pt")

    family: Literal["llamagen"] = Field("llamagen", description="LlamaGen: a transformer on tokens.")
    model: Annotated[GPTSize, FromFields] = Field(
        default_factory=lambda: GPT_SIZES["B"],
        description="A name (B, L, XL …) or the size itself; a DPAR size stands for its width and all its layers.",
    )

    @field_validator("model", mode="before")
    @classmethod
    def _size(cls, size: Any) -> Any:
        """So that the family alone has to be changed to get the model that a DPAR is compared with."""
        return gpt_size(size)


class NPPSettings(LlamaGenSettings):
    """LlamaGen trained by Next Patch Prediction."""

    family: Literal["npp"] = Field(  # type: ignore[assignment]
        "npp", description="LlamaGen trained by Next Patch Prediction."
    )
    npp: Annotated[NextPatchSchedule, FromFields] = Field(
        default_factory=NextPatchSchedule,
        description="Schedule of Next Patch Prediction: from blocks of tokens to single ones.",
    )

    @property
    def restarts(self) -> tuple[int, ...]:
        """Steps at which a level begins, the first left out."""
        return self.npp.ends(self.training.steps)[:-1]

    def grid_problem(self, grid: int) -> str | None:
        """The side of the largest blocks must divide the grid."""
        largest = self.npp.sides[0]
        if grid % largest == 0:
            return None
        return (
            f"train.npp.levels is {self.npp.levels}, so blocks of {largest} x {largest} tokens, on a grid of "
            f"{grid} x {grid}: expected a side that divides the grid, take fewer levels"
        )


FAMILIES: dict[str, type[TrainConfig]] = {
    "dpar": DPARSettings,
    "llamagen": LlamaGenSettings,
    "npp": NPPSettings,
}
assert {name: section.model_fields["family"].default for name, section in FAMILIES.items()} == {
    name: name for name in FAMILIES
}


def for_every_family(table: Mapping[str, _Entry]) -> dict[str, _Entry]:
    """The table, checked to have an entry for each family and no other."""
    assert set(table) == set(FAMILIES), f"entries {sorted(table)}, families {sorted(FAMILIES)}"
    return dict(table)


def without_other_families(fields: Mapping[str, Any], family: str) -> dict[str, Any]:
    """`fields` of this section without those that other families have and `family` has not."""
    return {name: value for name, value in fields.items() if not _owners(name, family)}


def _owners(name: str, family: str) -> list[str]:
    """Families that have a setting of this name, if `family` has none."""
    owners = [owner for owner, section in FAMILIES.items() if name in section.model_fields]
    return [] if family in owners or family not in FAMILIES else owners
