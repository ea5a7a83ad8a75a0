"""View of stage `train`: held-out loss of the model."""

from __future__ import annotations

from pathlib import Path

from conf.runtime import RuntimeConfig
from conf.train import TrainConfig
from stages.runtime.job import Inputs, main
from stages.stores.tokens import TokenStore
from stages.views.token_losses import write_losses


def train(config: TrainConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `metrics.json`: held-out loss in nats per token, and that of the best unigram model."""
    store = TokenStore.of(inputs)
    write_losses(output, inputs["train"], store, first_position=0)


if __name__ == "__main__":
    main(train, TrainConfig)
