"""Stage `train`: the class-conditional model, DPAR on patches, or a rival on tokens: LlamaGen, or LlamaGen by NPP.

A rival's weights can be imported instead: LlamaGen's were released.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conf.schema import EntropyHeadSettings, RuntimeConfig, TrainConfig
from models.config import DPARConfig, GPTConfig
from models.dpar import DPAR
from models.gpt import GPT
from stages.artifact import read_json
from stages.distributed import World, process_group
from stages.foreign_weights import read_gpt_checkpoint, write_source
from stages.job import Inputs, main
from stages.stores.entropies import EntropyStore
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenStore
from stages.training.compiled import compile_blocks
from stages.training.data import GPTObjective, TokenData
from stages.training.entropy_head import EntropyData, JointObjective, predict_with
from stages.training.loop import Training, train_model
from stages.training.next_patch import NextPatchData, NextPatchObjective
from stages.training.patched import DPARObjective, PatchedData
from stages.training.stream import SampleStream
from stages.training.token_scores import write_scores
from stages.weights import save_model


def train(config: TrainConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `model.safetensors`, its config and the held-out loss beside that of the best unigram model.

    The held-out loss is the mean over all T positions, with each image's own class. Of imported weights,
    `source.json` holds the SHA-256 of the file that they came from.
    """
    with process_group(runtime) as world:
        store = TokenStore.open(inputs["tokenize"] / "tokens.zarr")
        if config.source == "checkpoint":
            assert config.checkpoint is not None
            model, metrics = _import(config, config.checkpoint, store, world)
            if world.is_main:
                write_source(output, config.checkpoint)
        else:
            model, metrics = _train(config, store, inputs, output, world, compiled=runtime.compile)
        if world.is_main:
            save_model(output, config.family, model, model.config)
            write_scores(output, metrics, TokenData(store), first_position=0)


def _import(
    config: TrainConfig, checkpoint: Path, store: TokenStore, world: World
) -> tuple[GPT | DPAR, dict[str, float]]:
    """Released weights and their held-out loss. What was dropped out in their training is not known here."""
    shape = GPTConfig(
        **asdict(config.model),
        codebook_size=store.codebook_size,
        num_tokens=store.num_tokens,
        num_classes=store.num_classes,
    )
    model = read_gpt_checkpoint(checkpoint, shape).to(world.device).eval()
    with torch.no_grad():
        return model, TokenData(store).heldout_loss(GPTObjective(model), world)


def _train(
    config: TrainConfig, store: TokenStore, inputs: Inputs, output: Path, world: World, *, compiled: bool
) -> tuple[GPT | DPAR, dict[str, float]]:
    """A model trained from the start, or from where a killed run was, and its held-out loss."""
    torch.manual_seed(config.seed)
    family = _family(config, store, inputs)
    model, data = family.model, family.data
    if compiled:
        compile_blocks(model)
    stream = SampleStream(store.num_train, config.training.global_batch_size, config.seed)
    run = Training(
        model=model,
        objective=family.objective,
        batch=lambda step: data.training_batch(stream, step, world),
        data_state=lambda steps: stream.state(steps) | data.digests,
        validate=lambda: family.validate(world),
        config=config.training,
        seed=config.seed,
        restarts=config.restarts,
        clipped_apart=model.entropy_head if isinstance(model, DPAR) else None,
    )
    return model, train_model(run, output, world)


@dataclass(frozen=True)
class _Family:
    """A fresh model, its loss, the batches it reads, and what is said of it on held-out images."""

    model: GPT | DPAR
    objective: nn.Module
    data: TokenData
    validate: Callable[[World], dict[str, float]]

    @classmethod
    def plain(cls, model: GPT | DPAR, objective: nn.Module, data: TokenData) -> _Family:
        return cls(model, objective, data, lambda world: data.heldout_loss(objective, world))


def _family(config: TrainConfig, store: TokenStore, inputs: Inputs) -> _Family:
    size = asdict(config.model)
    common: dict[str, Any] = {
        "codebook_size": store.codebook_size,
        "num_tokens": store.num_tokens,
        "num_classes": store.num_classes,
        "dropout": config.dropout,
        "class_dropout_prob": config.class_dropout_prob,
    }
    if config.family == "dpar":
        shape = DPARConfig(**size, **common, position_embedding=config.position_embedding)
        return _dpar(shape, config.entropy_head, store, inputs)
    gpt = GPT(GPTConfig(**size, **common))
    if config.family == "npp":
        data = NextPatchData(store, config.npp, config.training.steps)
        return _Family.plain(gpt, NextPatchObjective(gpt), data)
    return _Family.plain(gpt, GPTObjective(gpt), TokenData(store))


def _dpar(shape: DPARConfig, head: EntropyHeadSettings, store: TokenStore, inputs: Inputs) -> _Family:
    """With a head, entropies are read too; the held-out loss stays that of the tokens.

    Static patches need none: no entropy opens them.
    """
    index = PatchIndex.open(inputs["patch_index"] / "patches.parquet", store.digest)
    static = read_json(inputs["patch_index"] / "rule.json")["mode"] == "static"
    model = DPAR(replace(shape, entropy_head="none" if static else head.kind))
    tokens_alone = DPARObjective(model)
    if model.entropy_head is None:
        return _Family.plain(model, tokens_alone, PatchedData(store, index))
    entropies = EntropyStore.open(inputs["entropy_map"] / "entropies.zarr")
    index.require_entropies(entropies.digest)
    data, predict = EntropyData(store, index, entropies), predict_with(model.entropy_head, model)

    def validate(world: World) -> dict[str, float]:
        return data.heldout_loss(tokens_alone, world) | data.heldout_fit(predict, world)

    return _Family(model, JointObjective(model, head.encoder_gradient), data, validate)


if __name__ == "__main__":
    main(train, TrainConfig)
