"""Stage `entropy_model`: an unconditional LlamaGen transformer, trained to predict the next token.

The entropy of its predictions decides where patches start. Source: paper, section 3.1.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from conf.entropy_model import EntropyModelConfig
from conf.runtime import RuntimeConfig
from models.config import GPTConfig
from models.gpt import GPT
from stages.runtime.distributed import process_group
from stages.runtime.job import Inputs, main
from stages.runtime.randomness import Purpose, seed_torch
from stages.stores.tokens import TokenStore
from stages.training.data import GPTObjective, TokenData
from stages.training.loop import train_model
from stages.training.validation import heldout_by_position, write_positions
from stages.weights.own import GPT_FAMILY, save_model


def entropy_model(config: EntropyModelConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `model.safetensors` and its config; the record holds its held-out loss, also by position."""
    with process_group(runtime) as world:
        data = TokenData(TokenStore.of(inputs))
        seed_torch(config.seed, Purpose.WEIGHTS)
        model = GPT(
            GPTConfig(
                **asdict(config.model),
                codebook_size=data.store.codebook_size,
                num_tokens=data.store.num_tokens,
                num_classes=None,
                dropout=config.dropout,
            )
        )
        objective = GPTObjective(model)
        run = data.training(model, objective, config.training, config.seed, world)
        train_model(run, output, world, runtime)
        by_position = heldout_by_position(data, objective.eval().token_losses, world)
    if world.is_main:
        write_positions(output, by_position)
        save_model(output, GPT_FAMILY, model, model.config)


if __name__ == "__main__":
    main(entropy_model, EntropyModelConfig)
