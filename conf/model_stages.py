"""Settings of the stages from patches to scores: `train`, `entropy_head`, `sample`, `evaluate`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator, model_validator

from conf.section import NOT_IN_KEY, Precision, Probability, Section, Seed, TrainingConfig
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
from models.guidance import Schedule

HeadChoice = Literal["none", "linear", "mlp", "block"]
BoundarySource = Literal["entropy_head", "entropy_model", "own_entropy", "static"]


class JointHeadConfig(Section):
    """An entropy head that learns together with the model. Without one, stage `entropy_head` trains it afterwards."""

    kind: HeadChoice = Field("none", description="As of entropy_head.kind.")
    weight: float = Field(1.0, gt=0, description="Of its squared error beside the tokens' cross-entropy.")
    stop_gradient: bool = Field(
        True, description="The encoder does not learn from the head: the model is the same as without one, bit for bit."
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
    position_embedding: PositionEmbedding = Field("dynamic", description="Of the global stack (paper, section 3.3).")
    npp: NextPatchSchedule = Field(default_factory=NextPatchSchedule, description="From blocks of tokens to tokens.")
    entropy_head: JointHeadConfig = Field(default_factory=JointHeadConfig)
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig(steps=1_500_000))
    dropout: Probability = 0.1
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

    @property
    def unread_inputs(self) -> frozenset[str]:
        """A rival knows no patches; without a head of its own DPAR reads no entropies."""
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


class SampleConfig(Section):
    """Images drawn from the finished model."""

    num_samples: PositiveInt = Field(50_000)
    labels: Literal["uniform", "balanced", "data"] = Field(
        "uniform", description="Random classes, the same number of each, or the class shares of the training images."
    )
    cfg_scale: float = Field(2.0, ge=1.0, description="Classifier-free guidance; 1 is none.")
    cfg_schedule: Schedule = Field("constant", description="Or from 1 at an image's first token to cfg_scale.")
    cfg_interval: tuple[NonNegativeInt, PositiveInt] | None = Field(
        None, description="Only these tokens of an image are guided: [first, last + 1]; null guides all."
    )
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0, description="Keep the k likeliest tokens; 0 keeps all.")
    top_p: float = Field(1.0, gt=0, le=1)
    boundaries: BoundarySource | None = Field(
        None,
        description="What decides where patches open; null: the entropy head if there is one, else the entropy model. "
        "Of a model on static patches only they.",
    )
    threshold: float | None = Field(None, description="Boundary threshold at sampling; null takes the source's own.")
    target_mean_length: float | None = Field(
        None, ge=1.0, description="Instead of it: the threshold that gives this mean length on the training images."
    )
    max_length: PositiveInt | None = Field(None, description="Longest patch at sampling; null takes the patch index's.")
    batch_size: PositiveInt = Field(32, description="Samples drawn together: the unit of work and of resume.")
    image_size: int = Field(256, ge=16, le=1024, description="Side of the stored images; decoded images are resized.")
    precision: Precision = Field("bfloat16", description="Of the weights that draw; logits are float32.")
    grid_columns: PositiveInt = Field(8, description="Samples a class in grid.png.")
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

    @property
    def own_rule(self) -> dict[str, float]:
        """The settings given that change the patch index's rule."""
        given = {name: getattr(self, name) for name in ("threshold", "target_mean_length", "max_length")}
        return {name: value for name, value in given.items() if value is not None}


class EvaluateConfig(Section):
    """Scores of the samples against the training images."""

    extractor: Literal["lite0", "inception"] = Field(
        "lite0", description="EfficientNet-Lite0 from the demo packages, or the FID Inception from a weights file."
    )
    weights: Path | None = Field(None, description="Inception weights file.", json_schema_extra=NOT_IN_KEY)
    input_size: int = Field(224, ge=64, le=512, description="Side that images are resized to for EfficientNet-Lite0.")
    batch_size: PositiveInt = 64
    max_reference: PositiveInt | None = Field(None, description="At most this many reference images; null takes all.")
    neighbours: PositiveInt = Field(3, description="k of precision and recall.")
    compared: PositiveInt = Field(
        10_000, description="Reference images that precision and recall look at, at most; their cost is quadratic."
    )
    ladder: bool = Field(True, description="Also score held-out images, reconstructions, marginals and random tokens.")
    seed: Seed = 0

    @model_validator(mode="after")
    def _weights_match(self) -> Self:
        if (self.extractor == "inception") != (self.weights is not None):
            raise ValueError(
                f"evaluate.extractor is {self.extractor} and evaluate.weights is {self.weights}, expected a weights "
                "file with inception and none with lite0"
            )
        return self
