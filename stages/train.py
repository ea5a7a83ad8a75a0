"""Stage `train`: the class-conditional model, of the family that the settings name. Its weights may be imported."""

from __future__ import annotations

from pathlib import Path

import torch

from conf.schema import RuntimeConfig
from conf.train import TrainConfig
from models.entropy_head import EntropyHead
from stages.families import RECIPES, Model, new_model, pretrained_model
from stages.runtime.distributed import World, process_group
from stages.runtime.job import Inputs, main
from stages.stores.tokens import TokenStore
from stages.training.compiled import compile_blocks
from stages.training.data import TokenData
from stages.training.loop import train_model
from stages.training.token_scores import write_scores
from stages.weights.own import save_head, save_model
from stages.weights.pretrained import write_source


def train(config: TrainConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `model.safetensors`, its config and the held-out loss beside that of the best unigram model.

    The held-out loss is the mean over all T positions, with each image's own class. An entropy head that was trained
    with the model lies beside it. Of imported weights, `source.json` holds the SHA-256 of the file that they came from.
    """
    with process_group(runtime) as world:
        store = TokenStore.of(inputs)
        data = RECIPES[config.family].batches(config, store, inputs)
        if config.imported is not None:
            model, metrics = _import(config, config.imported, data, world)
            if world.is_main:
                write_source(output, config.imported)
        else:
            model, head, metrics = _train(config, data, output, world, compiled=runtime.compile)
            if head is not None and world.is_main:
                save_head(output, head)
        if world.is_main:
            save_model(output, model.family, model.module, model.config)
            write_scores(output, metrics, TokenData(store), first_position=0)


def _import(config: TrainConfig, path: Path, data: TokenData, world: World) -> tuple[Model, dict[str, float]]:
    """A model with weights made elsewhere, and its held-out loss."""
    model = pretrained_model(config, path, data.store)
    model.module.to(world.device).eval()
    objective = RECIPES[config.family].objective(config, model.module, data)
    with torch.no_grad():
        return model, data.heldout_loss(objective.module, world)


def _train(
    config: TrainConfig, data: TokenData, output: Path, world: World, *, compiled: bool
) -> tuple[Model, EntropyHead | None, dict[str, float]]:
    """A model trained from the start, or from where a killed run was, the head beside it, and its held-out loss."""
    torch.manual_seed(config.seed)
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
        companions={} if objective.head is None else {"entropy_head": objective.head},
    )
    metrics = train_model(run, output, world)
    return model, objective.head, metrics


if __name__ == "__main__":
    main(train, TrainConfig)
