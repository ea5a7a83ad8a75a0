"""Stage `train`: the class-conditional model, DPAR on patches, or a rival on tokens: LlamaGen, or LlamaGen by NPP.

A rival's weights can be imported instead: LlamaGen's were released.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conf.schema import RuntimeConfig, TrainConfig
from models.config import DPARConfig, GPTConfig
from models.dpar import DPAR
from models.gpt import GPT
from stages.distributed import World, process_group
from stages.foreign_weights import read_gpt_checkpoint, write_source
from stages.job import Inputs, main
from stages.stores.patches import PatchIndex
from stages.stores.tokens import TokenStore
from stages.training.compiled import compile_blocks
from stages.training.data import GPTObjective, TokenData
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
    model, objective, data = _family(config, store, inputs)
    if compiled:
        compile_blocks(model)
    stream = SampleStream(store.num_train, config.training.global_batch_size, config.seed)
    run = Training(
        model=model,
        objective=objective,
        batch=lambda step: data.training_batch(stream, step, world),
        data_state=lambda steps: stream.state(steps) | data.digests,
        validate=lambda: data.heldout_loss(objective, world),
        config=config.training,
        seed=config.seed,
        restarts=config.restarts,
    )
    return model, train_model(run, output, world)


def _family(config: TrainConfig, store: TokenStore, inputs: Inputs) -> tuple[GPT | DPAR, nn.Module, TokenData]:
    """A fresh model, its loss, and the batches it reads."""
    size = asdict(config.model)
    common: dict[str, Any] = {
        "codebook_size": store.codebook_size,
        "num_tokens": store.num_tokens,
        "num_classes": store.num_classes,
        "dropout": config.dropout,
        "class_dropout_prob": config.class_dropout_prob,
    }
    if config.family == "dpar":
        dpar = DPAR(DPARConfig(**size, **common, position_embedding=config.position_embedding))
        index = PatchIndex.open(inputs["patch_index"] / "patches.parquet", store.digest)
        return dpar, DPARObjective(dpar), PatchedData(store, index)
    gpt = GPT(GPTConfig(**size, **common))
    if config.family == "npp":
        return gpt, NextPatchObjective(gpt), NextPatchData(store, config.npp, config.training.steps)
    return gpt, GPTObjective(gpt), TokenData(store)


if __name__ == "__main__":
    main(train, TrainConfig)
