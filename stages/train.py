"""Stage `train`: a class-conditional model of the family in the settings, trained or with imported weights."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from conf.runtime import RuntimeConfig
from conf.train import TrainConfig
from conf.weights import ImportableModel
from models.attention import packed_backend
from models.dpar import DPAR
from stages.families import RECIPES, Model, Objective, new_model, pretrained_model
from stages.runtime.distributed import World, process_group
from stages.runtime.job import Inputs, main
from stages.runtime.randomness import Purpose, seed_torch
from stages.sampling.snapshots import preview_of
from stages.stores.tokens import TokenStore
from stages.training.compiled import is_compiled
from stages.training.data import HasTokenLosses, TokenData
from stages.training.log import MetricLog
from stages.training.loop import train_model
from stages.training.validation import heldout_by_position, heldout_loss, write_positions
from stages.weights.own import save_head, save_model
from stages.weights.pretrained import write_source

logger = logging.getLogger(__name__)


def train(config: TrainConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `model.safetensors` and its config, and the weights of a jointly trained entropy head if there is one.

    The record holds the held-out loss: the mean over all T positions, conditioned on each image's class, and the loss
    of each position. For imported weights, it also holds `source.json`, which says what file they came from and how it
    was read.
    """
    head = None
    with process_group(runtime) as world:
        store = TokenStore.of(inputs)
        data = RECIPES[config.family].batches(config, store, inputs)
        if config.imported is not None:
            model = pretrained_model(config, config.imported, store)
            objective = RECIPES[config.family].objective(config, model.module, data)
            _score(objective, data, output, world)
        else:
            model, objective = _train(config, data, inputs, output, world, runtime)
            head = objective.head
        scored, by_position = objective.module.eval(), None
        if isinstance(scored, HasTokenLosses):
            by_position = heldout_by_position(data, scored.token_losses, world)
    if world.is_main:
        write_positions(output, by_position)
        if isinstance(config, ImportableModel) and config.imported is not None:
            write_source(output, config.imported, config.weights)
        if head is not None:
            save_head(output, head)
        save_model(output, model.family, model.module, model.config, store.facts.vq_sha256)


def _score(objective: Objective, data: TokenData, output: Path, world: World) -> None:
    """Write the held-out loss of imported weights to the record."""
    objective.module.to(world.device).eval()
    with torch.no_grad():
        loss = heldout_loss(data, objective.module, world)
    MetricLog(output, 0, enabled=world.is_main).write(0, loss)


def _train(
    config: TrainConfig, data: TokenData, inputs: Inputs, output: Path, world: World, runtime: RuntimeConfig
) -> tuple[Model, Objective]:
    """Train a model, or resume a killed run. Returns the model, and the module that computes its loss."""
    seed_torch(config.seed, Purpose.WEIGHTS)
    model = new_model(config, data.store)
    objective = RECIPES[config.family].objective(config, model.module, data)
    if isinstance(model.module, DPAR):
        dtype, compiled = getattr(torch, config.training.precision), is_compiled(runtime.compile, world.device)
        backend = packed_backend(world.device, dtype, model.module.head_dim, compiled=compiled)
        logger.info("packed attention in training: %s", backend)
    run = data.training(
        model.module,
        objective.module,
        config.training,
        config.seed,
        world,
        restarts=config.restarts,
        auxiliary={} if objective.head is None else {"entropy_head": objective.head},
        preview=preview_of(config, model, data, inputs, output, world.device) if world.is_main else None,
    )
    train_model(run, output, world, runtime)
    return model, objective


if __name__ == "__main__":
    main(train, TrainConfig)
