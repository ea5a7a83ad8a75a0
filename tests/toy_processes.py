"""A process of torchrun that trains toy models one after the other, in the folder that it is given.

What it leaves there: the run of each of `NAMES`; `divided`, in micro-batches; `game`, with the weights of each rank;
and `noisy`, a run that it goes on with until rank 1 gets SIGTERM, with what each rank says then in `stop-0.txt` and
`stop-1.txt`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import toy_game
from toy_training import interrupt, objective, training

from conf.runtime import RuntimeConfig
from stages.runtime.distributed import World, process_group
from stages.runtime.errors import Interrupted
from stages.training.loop import Training, train_model

NAMES = ("dpar", "joint_head", "npp", "tokenizer")


def toy(name: str = "dpar", noise: float = 0.0) -> Training[Any]:
    """20 steps of a toy model."""
    return training(name, objective(name, **({"dropout": noise, "class_dropout_prob": noise} if noise else {})))


def train(run: Training[Any], output: Path, world: World, micro_batch: int | None = None) -> None:
    train_model(run, output, world, RuntimeConfig(device="cpu", micro_batch=micro_batch))


def main(folder: Path) -> None:
    with process_group(RuntimeConfig(device="cpu", threads=1)) as world:
        for name in NAMES:
            train(toy(name), folder / name, world)
        train(toy(), folder / "divided", world, micro_batch=3)
        game, run = toy_game.training()
        train(run, folder / "game", world)
        torch.save(game.state_dict(), folder / f"game/{world.rank}.pt")
        run = toy(noise=0.3)
        if world.rank == 1:
            interrupt(run, 5)
        try:
            train(run, folder / "noisy", world, micro_batch=4)
        except Interrupted as stop:
            (folder / f"stop-{world.rank}.txt").write_text(str(stop))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
