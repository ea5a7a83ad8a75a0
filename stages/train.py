"""Stage `train`: a class-conditional model of the family in the settings, trained or with imported weights."""

from __future__ import annotations

from pathlib import Path

import torch

from conf.runtime import RuntimeConfig
from conf.train import TrainConfig
from models.entropy_head import EntropyHead
from stages.families import RECIPES, Model, new_model, pretrained_model
from stages.runtime.distributed import World, process_group
from stages.runtime.job import Inputs, main
from stages.runtime.randomness import Purpose, seed_torch
from stages.stores.tokens import TokenStore
from stages.training.compiled import compile_blocks
from stages.training.data import TokenData
from stages.training.log import MetricLog
from stages.training.loop import train_model
from stages.training.validation import heldout_loss
from stages.weights.own import save_head, save_model
from stages.weights.pretrained import write_source


def train(config: TrainConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `model.safetensors` and its config, and the weights of a jointly trained entropy head if there is one.

    The record holds the held-out loss: the mean over all T positions, conditioned on each image's class. For imported
    weights, it also holds `source.json` with the SHA-256 of the weights file.
    """
    with process_group(runtime) as world:
        store = TokenStore.of(inputs)
        data = RECIPES[config.family].batches(config, store, inputs)
        if config.imported is not None:
            model = _import(config, config.imported, data, output, world)
            head = None
        else:
            model, head = _train(config, data, output, world, compiled=runtime.compile)
    if world.is_main:
        if config.imported is not None:
            write_source(output, config.imported)
        if head is not None:
            save_head(output, head)
        save_model(output, model.family, model.module, model.config, store.facts.vq_sha256)


def _import(config: TrainConfig, path: Path, data: TokenData, output: Path, world: World) -> Model:
    """Import pretrained weights, and write their held-out loss to the record."""
    model = pretrained_model(config, path, data.store)
    model.module.to(world.device).eval()
    objective = RECIPES[config.family].objective(config, model.module, data)
    with torch.no_grad():
        loss = heldout_loss(data, objective.module, world)
    MetricLog(output, 0, enabled=world.is_main).write(0, loss)
    return model


def _train(
    config: TrainConfig, data: TokenData, output: Path, world: World, *, compiled: bool
) -> tuple[Model, EntropyHead | None]:
    """Train a model, or resume a killed run. Returns the model, and the jointly trained head if there is one."""
    seed_torch(config.seed, Purpose.WEIGHTS)
    model = new_model(config, data.store)
    objective = RECIPES[config.family].objective(config, model.module, data)
    if compiled:
        compile_blocks(model.module)
    run = data.training(
        model.module,
        objective.module,
        config.training,
        config.seed,
        world,
        restarts=config.restarts,
        auxiliary={} if objective.head is None else {"entropy_head": objective.head},
    )
    train_model(run, output, world)
    return model, objective.head


if __name__ == "__main__":
    main(train, TrainConfig)
