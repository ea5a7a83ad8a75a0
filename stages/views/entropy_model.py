"""View of stage `entropy_model`: held-out loss of the model."""

from __future__ import annotations

from pathlib import Path

from conf.entropy_model import EntropyModelConfig
from conf.runtime import RuntimeConfig
from stages.runtime.job import Inputs, main
from stages.stores.tokens import TokenStore
from stages.views.token_losses import write_losses


def entropy_model(config: EntropyModelConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `metrics.json`: held-out loss in nats per token, and that of the best unigram model."""
    store = TokenStore.of(inputs)
    write_losses(output, inputs["entropy_model"], store, first_position=1)


if __name__ == "__main__":
    main(entropy_model, EntropyModelConfig)
