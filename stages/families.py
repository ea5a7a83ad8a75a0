"""The model families of stage `train`: how each is built, trained, loaded and sampled.

`conf.train` holds their settings, `pipeline.bench.family_costs` their costs. There are two tables with an entry for
each family. Loading and sampling a finished model do not depend on how models are trained, so their cache keys must not
depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from conf.train import (
    DPARSettings,
    JointHeadConfig,
    LlamaGenSettings,
    NPPSettings,
    TrainConfig,
    TransformerSettings,
    for_every_family,
)
from models.boundaries import Boundaries
from models.canvas import Canvas
from models.config import DPARConfig, EntropyHeadConfig, GPTConfig
from models.dpar import DPAR
from models.dpar_steps import DPARSteps
from models.entropy_head import EntropyHead
from models.gpt import GPT
from models.gpt_steps import GPTSteps
from models.sampling import Sampling, StepsOfModel
from models.token_sampling import SamplingOptions
from stages.patches.rule import SavedRule
from stages.runtime.job import Inputs
from stages.stores.entropies import EntropyStore
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenStore
from stages.training.data import GPTObjective, TokenData
from stages.training.entropies import EntropyData, JointObjective
from stages.training.next_patch import NextPatchData, NextPatchObjective
from stages.training.patched import DPARObjective, PatchedData
from stages.weights.own import MODEL_FILE, ModelConfig, load_weights, saved_config
from stages.weights.pretrained import read_dpar_checkpoint, read_gpt_checkpoint


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The functions that load and sample a finished model."""

    config: Callable[..., ModelConfig]
    """Makes the config from its saved fields."""
    module: Callable[[Any], nn.Module]
    """Makes the module of a config, with fresh weights."""
    steps: StepsOfModel
    """The steps that sample its images."""


@dataclass(frozen=True)
class Model:
    """A model of some family."""

    family: str
    module: nn.Module
    config: ModelConfig

    @classmethod
    def load(cls, artifact: Path, device: torch.device | str = "cpu") -> Self:
        """The class-conditional model of a finished `train` artifact, in evaluation mode.

        Raises:
            ArtifactError: The artifact holds another kind of model, or is damaged.
        """
        family, fields = saved_config(artifact, ARCHITECTURES)
        architecture = ARCHITECTURES[family]
        config = architecture.config(**fields)
        module = load_weights(architecture.module(config), artifact / MODEL_FILE)
        return cls(family, module.to(device).eval(), config)

    def sampling(
        self,
        labels: Int[Tensor, " N"],
        uniforms: Float[Tensor, "N T"],
        options: SamplingOptions,
        boundaries: Boundaries | None,
        prefix: Int[Tensor, "N M"] | None,
        batch: int,
    ) -> Sampling:
        """Images of the given classes, not sampled yet; see `models.sampling`."""
        assert self.config.num_classes is not None  # only entropy models have no classes
        canvas = Canvas(labels, uniforms, options, self.config.num_classes, prefix)
        return Sampling(canvas, ARCHITECTURES[self.family].steps, self.module, boundaries, batch=batch)


def load_model(artifact: Path, device: torch.device | str = "cpu") -> nn.Module:
    """The module of `Model.load`."""
    return Model.load(artifact, device).module


ARCHITECTURES: dict[str, Architecture] = for_every_family(
    {
        "dpar": Architecture(config=DPARConfig, module=DPAR, steps=DPARSteps),
        "llamagen": Architecture(config=GPTConfig, module=GPT, steps=GPTSteps),
        "npp": Architecture(config=GPTConfig, module=GPT, steps=GPTSteps),
    }
)


@dataclass(frozen=True)
class Objective:
    """The module that computes the loss of a batch, and the jointly trained entropy head in it, if any."""

    module: nn.Module
    head: EntropyHead | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The functions that train a family. The first argument of each is the family's section of the settings."""

    config: Callable[[Any, TokenStore], ModelConfig]
    """Makes the config of a model for the tokens of a store."""
    batches: Callable[[Any, TokenStore, Inputs], TokenData]
    """Makes training and held-out batches."""
    objective: Callable[[Any, Any, Any], Objective]
    """Makes the loss of a module on the family's batches."""
    pretrained: Callable[[Any, Path, TokenStore], Model] | None
    """Imports pretrained weights from a file; None for a family without any."""


def new_model(settings: TrainConfig, store: TokenStore) -> Model:
    """A model for these tokens with fresh weights."""
    config = RECIPES[settings.family].config(settings, store)
    return Model(settings.family, ARCHITECTURES[settings.family].module(config), config)


def pretrained_model(settings: TrainConfig, path: Path, store: TokenStore) -> Model:
    """A model for these tokens with pretrained weights.

    Raises:
        InputError: The file is missing or unreadable, or its weights belong to another model.
    """
    pretrained = RECIPES[settings.family].pretrained
    assert pretrained is not None  # only families with pretrained weights have a setting for a file
    return pretrained(settings, path, store)


def _of_tokens(store: TokenStore) -> dict[str, Any]:
    """Config fields that follow from the tokens."""
    return {
        "codebook_size": store.codebook_size,
        "num_tokens": store.num_tokens,
        "num_classes": store.num_classes,
    }


def _dropout(settings: TransformerSettings) -> dict[str, Any]:
    return {"dropout": settings.dropout, "class_dropout_prob": settings.class_dropout_prob}


def _dpar_config(settings: DPARSettings, store: TokenStore) -> DPARConfig:
    return DPARConfig(
        **asdict(settings.model),
        **_of_tokens(store),
        **_dropout(settings),
        position_embedding=settings.position_embedding,
    )


def _gpt_config(settings: LlamaGenSettings, store: TokenStore) -> GPTConfig:
    return GPTConfig(**asdict(settings.model), **_of_tokens(store), **_dropout(settings))


def _patched_batches(settings: DPARSettings, store: TokenStore, inputs: Inputs) -> PatchedData:
    """Patched batches, with entropies if a head is trained. Static patches need no entropies and no head."""
    index = PatchIndex.of(inputs, store)
    if settings.entropy_head.kind == "none" or SavedRule.of(inputs).mode == "static":
        return PatchedData(store, index)
    return EntropyData(store, index, EntropyStore.of(inputs))


def _patched_objective(settings: DPARSettings, model: DPAR, data: PatchedData) -> Objective:
    joint: JointHeadConfig = settings.entropy_head
    if joint.kind == "none" or not isinstance(data, EntropyData):
        return Objective(DPARObjective(model))
    # The head is made after the model, so that the model's initial weights do not depend on it.
    head = EntropyHead(EntropyHeadConfig.of(model.config, joint.kind))
    return Objective(JointObjective(model, head, joint.weight, stop_gradient=joint.stop_gradient), head)


def _next_patch_batches(settings: NPPSettings, store: TokenStore, inputs: Inputs) -> NextPatchData:
    return NextPatchData(store, settings.npp, settings.training.steps)


def _pretrained_gpt(settings: LlamaGenSettings, path: Path, store: TokenStore) -> Model:
    """Import LlamaGen weights. Their dropout is unknown, so the config keeps the default."""
    config = GPTConfig(**asdict(settings.model), **_of_tokens(store))
    module = read_gpt_checkpoint(path, config, tokenizer=store.facts.vq_sha256, weights=settings.weights)
    return Model(settings.family, module, module.config)


def _pretrained_dpar(settings: DPARSettings, path: Path, store: TokenStore) -> Model:
    """Import DPAR weights. Their dropout is unknown, so the config keeps the default."""
    position_embedding = settings.position_embedding
    config = DPARConfig(**asdict(settings.model), **_of_tokens(store), position_embedding=position_embedding)
    module = read_dpar_checkpoint(path, config, tokenizer=store.facts.vq_sha256, weights=settings.weights)
    return Model(settings.family, module, module.config)


RECIPES: dict[str, Recipe] = for_every_family(
    {
        "dpar": Recipe(
            config=_dpar_config,
            batches=_patched_batches,
            objective=_patched_objective,
            pretrained=_pretrained_dpar,
        ),
        "llamagen": Recipe(
            config=_gpt_config,
            batches=lambda settings, store, inputs: TokenData(store),
            objective=lambda settings, model, data: Objective(GPTObjective(model)),
            pretrained=_pretrained_gpt,
        ),
        "npp": Recipe(
            config=_gpt_config,
            batches=_next_patch_batches,
            objective=lambda settings, model, data: Objective(NextPatchObjective(model)),
            pretrained=_pretrained_gpt,
        ),
    }
)
