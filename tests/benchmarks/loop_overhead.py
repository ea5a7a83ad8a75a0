"""What the training loop adds to its steps: data, logs, signals, the watch for bad losses. Measured in turns.

A run of 2 n steps takes n steps of the loop longer than a run of n steps: what both do once, at their start and end,
falls out of the difference. It is compared with n bare steps: forward, backward, clipping, AdamW.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from report import report
from synthetic import CODEBOOK, TOKENS, write_tokens
from timing import interleaved
from torch import nn

from conf.runtime import RuntimeConfig
from conf.section import TrainingConfig
from models.config import GPTConfig
from models.gpt import GPT
from pipeline.bench.gates import Gate, gate
from stages.runtime.distributed import World
from stages.stores.tokens import TokenStore
from stages.training.data import GPTObjective, TokenBatch, TokenData
from stages.training.loop import train_model
from stages.training.optim import make_optimizer

BOUND = 1.03
IMAGES_IN_STORE = 8192
WORLD = World(0, 1, torch.device("cpu"))
RUNTIME = RuntimeConfig(device="cpu")


class Setup:
    """A model, its data, and runs of it."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        write_tokens(folder / "tokens.zarr", IMAGES_IN_STORE)
        self.folder, self.options = folder, options
        self.data = TokenData(TokenStore.open(folder / "tokens.zarr"))
        torch.manual_seed(0)
        shape = {"codebook_size": CODEBOOK, "num_tokens": TOKENS, "num_classes": None}
        size = {"dim": options.dim, "num_layers": options.layers, "num_heads": options.dim // 32}
        self.model = GPT(GPTConfig(**size, **shape))
        self.objective = GPTObjective(self.model)
        tokens = torch.randint(CODEBOOK, (options.images, TOKENS))
        self.batch = TokenBatch(tokens, torch.zeros(options.images, dtype=torch.int64))
        self.optimizer = make_optimizer(self.model, self.config(1))

    def config(self, steps: int) -> TrainingConfig:
        """Settings of a run that logs every 10 steps."""
        return TrainingConfig(
            steps=steps, global_batch_size=self.options.images, precision="float32", log_every=10, learning_rate=1e-5
        )

    def loop(self, steps: int) -> None:
        """A whole run, from the start."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        run = self.data.training(self.model, self.objective, self.config(steps), 0, WORLD)
        train_model(run, self.folder / "run", WORLD, RUNTIME)

    def bare(self, steps: int) -> None:
        """The same steps without a loop, on one batch that is ready."""
        self.objective.train()
        for _ in range(steps):
            self.optimizer.zero_grad(set_to_none=True)
            loss, _ = self.objective(self.batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()


def measure(setup: Setup, steps: int, rounds: int) -> tuple[Gate, dict[str, float]]:
    """The gate, and the times of a step."""
    found = interleaved(
        {
            "bare": lambda: setup.bare(steps),
            "short": lambda: setup.loop(steps),
            "long": lambda: setup.loop(2 * steps),
        },
        rounds,
    )
    loop, bare = (found["long"] - found["short"]) / steps, found["bare"] / steps
    return gate("training loop / bare step, time", loop / bare, "<", BOUND), {
        "bare step, ms": 1000 * bare,
        "step of the loop, ms": 1000 * loop,
        "start and end of a run, ms": 1000 * (found["short"] - steps * loop),
    }


def main() -> None:
    """Measure and print what was found."""
    parser = argparse.ArgumentParser(description="What the training loop adds to its steps.")
    parser.add_argument("--dim", type=int, default=256, help="Width of the model.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--images", type=int, default=4, help="Images in a batch.")
    parser.add_argument("--steps", type=int, default=20, help="Steps of the shorter of both runs.")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, figures = measure(Setup(Path(folder), options), options.steps, options.rounds)
    report([found], {"loop": figures})


if __name__ == "__main__":
    main()
