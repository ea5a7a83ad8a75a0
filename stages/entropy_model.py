"""Stage `entropy_model`: an unconditional LlamaGen transformer that predicts the next token, trained or imported.

The entropy of its predictions decides where patches start. Source: paper, section 3.1.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from conf.entropy_model import EntropyModelConfig
from conf.runtime import RuntimeConfig
from models.config import GPTConfig
from models.gpt import GPT
from stages.runtime.distributed import World, process_group
from stages.runtime.job import Inputs, main
from stages.runtime.randomness import Purpose, seed_torch
from stages.stores.tokens import TokenStore
from stages.training.data import GPTObjective, TokenData
from stages.training.log import MetricLog
from stages.training.loop import train_model
from stages.training.validation import heldout_by_position, heldout_loss, write_positions
from stages.weights.own import GPT_FAMILY, save_model
from stages.weights.pretrained import read_gpt_checkpoint, write_source


def entropy_model(config: EntropyModelConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `model.safetensors` and its config.

    The record holds its held-out loss, also by position. For imported weights, it also holds `source.json`, which says
    what file they came from and how it was read.

    Raises:
        InputError: The weights to import do not fit the settings, or belong to other tokens.
    """
    with process_group(runtime) as world:
        store = TokenStore.of(inputs)
        if config.imported is None:
            model = _train(config, store, output, runtime, world)
        else:
            model = _import(config, config.imported, store, output, world)
        by_position = heldout_by_position(TokenData(store), GPTObjective(model.eval()).token_losses, world)
    if world.is_main:
        write_positions(output, by_position)
        if config.imported is not None:
            write_source(output, config.imported, config.weights)
        save_model(output, GPT_FAMILY, model, model.config, store.facts.vq_sha256)


def _train(config: EntropyModelConfig, store: TokenStore, output: Path, runtime: RuntimeConfig, world: World) -> GPT:
    data = TokenData(store)
    seed_torch(config.seed, Purpose.WEIGHTS)
    model = GPT(replace(_shape(config, store), dropout=config.dropout))
    run = data.training(model, GPTObjective(model), config.training, config.seed, world)
    train_model(run, output, world, runtime)
    return model


def _import(config: EntropyModelConfig, path: Path, store: TokenStore, output: Path, world: World) -> GPT:
    """Import weights, and write their held-out loss on these tokens to the record."""
    shape = _shape(config, store)
    model = read_gpt_checkpoint(
        path, shape, section="entropy_model", tokenizer=store.facts.vq_sha256, weights=config.weights
    )
    model.to(world.device).eval()
    with torch.no_grad():
        loss = heldout_loss(TokenData(store), GPTObjective(model), world)
    MetricLog(output, 0, enabled=world.is_main).write(0, loss)
    return model


def _shape(config: EntropyModelConfig, store: TokenStore) -> GPTConfig:
    of_tokens = {"codebook_size": store.codebook_size, "num_tokens": store.num_tokens}
    return GPTConfig(**asdict(config.model), **of_tokens, num_classes=None)


if __name__ == "__main__":
    main(entropy_model, EntropyModelConfig)
