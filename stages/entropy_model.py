"""Stage `entropy_model`: an unconditional LlamaGen transformer, trained to predict the next token.

How uncertain it is about a token decides where patches start (paper, section 3.1).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from conf.entropy_model import EntropyModelConfig
from conf.schema import RuntimeConfig
from models.config import GPTConfig
from models.gpt import GPT
from stages.runtime.distributed import process_group
from stages.runtime.job import Inputs, main
from stages.stores.tokens import TokenStore
from stages.training.compiled import compile_blocks
from stages.training.data import GPTObjective, TokenData
from stages.training.loop import train_model
from stages.training.token_scores import write_scores
from stages.weights.own import GPT_FAMILY, save_model


def entropy_model(config: EntropyModelConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `model.safetensors`, its config and the held-out loss beside that of the best unigram model."""
    with process_group(runtime) as world:
        data = TokenData(TokenStore.of(inputs))
        torch.manual_seed(config.seed)
        model = GPT(
            GPTConfig(
                **asdict(config.model),
                codebook_size=data.store.codebook_size,
                num_tokens=data.store.num_tokens,
                num_classes=None,
                dropout=config.dropout,
            )
        )
        if runtime.compile:
            compile_blocks(model)
        objective = GPTObjective(model)
        metrics = train_model(data.training(model, objective, config.training, config.seed, world), output, world)
        if world.is_main:
            save_model(output, GPT_FAMILY, model, model.config)
            write_scores(output, metrics, data, first_position=1)


if __name__ == "__main__":
    main(entropy_model, EntropyModelConfig)
