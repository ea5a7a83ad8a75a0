"""The training loop of every model: forward, backward, step, log, checkpoint.

Randomness of step s on rank r is seeded from (seed, s, r), so weights, optimisers and step number are the whole state:
a run that was killed goes on from its last checkpoint to the same weights, bit for bit on CPU.

A companion learns in the same step as the model: a discriminator, or a head that must not change how the model is
trained. The objective adds all losses, so that one backward pass gives every gradient, and then each optimiser takes
its step. A discriminator's loss and the model's are cut off from each other's weights; as it judges what the model made
before its step, this equals training them in turn, as GANs usually are.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from conf.section import TrainingConfig
from stages.runtime.artifact import RECORD
from stages.runtime.distributed import World, all_reduce_sum, barrier, return_free_memory
from stages.runtime.errors import ArtifactError
from stages.runtime.prefetch import prefetch
from stages.runtime.progress import Progress
from stages.runtime.randomness import Purpose, seed_torch
from stages.training.checkpoint import load_latest, save_checkpoint
from stages.training.log import MetricLog
from stages.training.optim import learning_rate
from stages.training.state import TrainingState

logger = logging.getLogger(__name__)
Batch = TypeVar("Batch")
CHECKPOINTS = Path(RECORD) / "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Training(Generic[Batch]):
    """What differs between the models that the loop trains.

    Attributes:
        model: The weights that are trained and kept.
        objective: Module around all that is trained: `objective(batch)` gives the loss and named scalars to log.
        batch: This process's batch of a step, made ahead in a thread.
        data_state: What `batch` stands for after so many steps: seed, samples seen, digests of the data. It goes into
            checkpoints, and a checkpoint of another state is refused.
        validate: Held-out metrics, computed at every checkpoint.
        config: Steps, batch, optimiser.
        seed: Seed of dropout and of everything else that is random in the forward pass.
        restarts: Steps at which the learning rate's schedule begins anew.
        companions: Weights in `objective` beside those of `model`, by name, each with an optimiser and a gradient norm
            of its own. Each weight needs a gradient in every step, a zero one if need be. They are not averaged.
    """

    model: nn.Module
    objective: nn.Module
    batch: Callable[[int], Batch]
    data_state: Callable[[int], dict[str, int | str]]
    validate: Callable[[], dict[str, float]]
    config: TrainingConfig
    seed: int
    restarts: tuple[int, ...] = ()
    companions: Mapping[str, nn.Module] = field(default_factory=dict)


def train_model(run: Training[Any], output: Path, world: World) -> dict[str, float]:
    """Train to the last step, from the last checkpoint if there is one, and return the final held-out metrics.

    With an `ema_decay`, held-out metrics are of the averaged weights, and `run.model` holds these in the end.
    """
    run.objective.to(world.device)
    state = TrainingState(run.model, run.companions, run.config)
    first = _resume(run, state, output, world)
    objective = DistributedDataParallel(run.objective) if world.size > 1 else run.objective
    log = MetricLog(output, first, enabled=world.is_main)
    progress = Progress(output, "steps", run.config.steps, done=first, enabled=world.is_main)
    since = time.perf_counter()
    run.objective.train()
    with prefetch(run.batch, range(first, run.config.steps), threads=1, depth=1) as batches:
        for step, batch in enumerate(batches, first):
            metrics = train_step(run, objective, state, batch, step, world)
            done = step + 1
            if done % run.config.log_every == 0 or done == run.config.steps:
                numbers = _mean_over_ranks(metrics, world)
                _check_finite(numbers, done)
                elapsed, since = time.perf_counter() - since, time.perf_counter()
                images = run.config.global_batch_size * ((done - 1) % run.config.log_every + 1)
                log.write(done, numbers | {"images_per_second": images / elapsed})
                return_free_memory()
                progress.update(done, f"loss {numbers['loss']:.4f}")
            if done % run.config.checkpoint_every == 0 and done < run.config.steps:
                with state.averaged():
                    log.write(done, _validate(run))
                _save(run, state, output, done, world)
    return _finish(run, state, output, log, world)


def train_step(
    run: Training[Any], objective: nn.Module, state: TrainingState, batch: Any, step: int, world: World
) -> dict[str, Tensor]:
    """One step of every optimiser. The named scalars stay on the device: reading them would make the host wait."""
    seed_torch(run.seed, Purpose.TRAINING_STEP, step, world.rank)
    bfloat16 = run.config.precision == "bfloat16"
    with torch.autocast(world.device.type, torch.bfloat16, enabled=bfloat16):
        loss, metrics = objective(batch)
    rate = learning_rate(step, run.config, run.restarts)
    norms = state.step(loss, rate)
    return {"loss": loss.detach(), **norms, "learning_rate": torch.tensor(rate), **metrics}


def _resume(run: Training[Any], state: TrainingState, output: Path, world: World) -> int:
    """Load the newest checkpoint; the number of steps done.

    Raises:
        ArtifactError: It was trained on other data, or in another order.
    """
    saved = load_latest(output / CHECKPOINTS, world.device)
    if saved is None:
        return 0
    _check_data(saved.get("data", {}), run.data_state(saved["step"]), output / CHECKPOINTS)
    state.load_state_dict(saved)
    logger.info("going on from step %d", saved["step"])
    return int(saved["step"])


def _check_data(found: dict[str, int | str], wanted: dict[str, int | str], folder: Path) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ArtifactError(
                f"the checkpoints in {folder} were trained with {name} {found.get(name)}, expected {wanted.get(name)}: "
                "they belong to other data, remove them to train from the start"
            )


def _save(run: Training[Any], state: TrainingState, output: Path, done: int, world: World) -> None:
    if world.is_main:
        saved = state.state_dict() | {"step": done, "data": run.data_state(done)}
        # The last one is kept with the artifact as its training state; before that, one spare.
        save_checkpoint(output / CHECKPOINTS, done, saved, keep=1 if done == run.config.steps else 2)
    barrier()


def _finish(run: Training[Any], state: TrainingState, output: Path, log: MetricLog, world: World) -> dict[str, float]:
    with state.averaged():
        final = _validate(run)
    log.write(run.config.steps, final)
    _save(run, state, output, run.config.steps, world)
    state.keep_average()
    return final


def _validate(run: Training[Any]) -> dict[str, float]:
    run.objective.eval()
    with torch.no_grad():
        metrics = run.validate()
    run.objective.train()
    return metrics


def _mean_over_ranks(metrics: dict[str, Tensor], world: World) -> dict[str, float]:
    stacked = torch.stack([value.float().to(world.device) for value in metrics.values()])
    means = (all_reduce_sum(stacked) / world.size).tolist()
    return dict(zip(metrics, means, strict=True))


def _check_finite(numbers: dict[str, float], step: int) -> None:
    if not math.isfinite(numbers["loss"]):
        raise RuntimeError(
            f"loss is {numbers['loss']} at step {step}, expected a finite number: lower training.learning_rate or "
            "lengthen training.warmup_steps"
        )
