"""The training loop of every model: forward, backward, step, log, checkpoint.

The random state of step s on rank r is seeded from (seed, s, r). Weights, optimisers and the step number are therefore
the whole state: a killed run resumes from its last checkpoint and ends with the same weights, bit for bit on CPU.

Auxiliary modules, e.g. a discriminator or an entropy head, are trained in the same step as the model. The objective
adds all losses, so one backward pass gives every gradient; then each optimiser takes its step. The discriminator's loss
has no gradient in the model, and the model's adversarial loss has none in the discriminator. The discriminator sees the
model's output from before the model's step, so this equals the usual alternating training of GANs.
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
    """A training run: everything that differs between models.

    Attributes:
        model: The trained model, whose weights are kept.
        objective: Module that contains all trained weights. `objective(batch)` gives the loss and named scalars to log.
        batch: This process's batch of a step. It is prepared in a thread.
        data_state: State of the data after a number of steps: seed, samples seen, digests. It is saved in checkpoints,
            and a checkpoint with another state is an error.
        validate: Held-out metrics, computed at every checkpoint.
        config: Steps, batch size, optimiser.
        seed: Seed of dropout and of all other randomness in the forward pass.
        restarts: Steps at which the learning rate schedule starts again.
        auxiliary: Modules in `objective` that are trained besides `model`, by name. Each has its own optimiser and
            gradient norm. Every parameter needs a gradient at every step, even if it is zero. No average is kept of
            them.
    """

    model: nn.Module
    objective: nn.Module
    batch: Callable[[int], Batch]
    data_state: Callable[[int], dict[str, int | str]]
    validate: Callable[[], dict[str, float]]
    config: TrainingConfig
    seed: int
    restarts: tuple[int, ...] = ()
    auxiliary: Mapping[str, nn.Module] = field(default_factory=dict)


def train_model(run: Training[Any], output: Path, world: World) -> dict[str, float]:
    """Train to the last step, from the last checkpoint if there is one, and return the final held-out metrics.

    With an `ema_decay`, held-out metrics use the averaged weights, and `run.model` holds the averaged weights at the
    end.

    Raises:
        ArtifactError: The last checkpoint belongs to other data.
        RuntimeError: The loss is not finite.
    """
    run.objective.to(world.device)
    state = TrainingState(run.model, run.auxiliary, run.config)
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
    """One step of every optimiser. The named scalars stay on the device, because reading them would force a sync."""
    seed_torch(run.seed, Purpose.TRAINING_STEP, step, world.rank)
    bfloat16 = run.config.precision == "bfloat16"
    with torch.autocast(world.device.type, torch.bfloat16, enabled=bfloat16):
        loss, metrics = objective(batch)
    rate = learning_rate(step, run.config, run.restarts)
    norms = state.step(loss, rate)
    return {"loss": loss.detach(), **norms, "learning_rate": torch.tensor(rate), **metrics}


def _resume(run: Training[Any], state: TrainingState, output: Path, world: World) -> int:
    """Load the newest checkpoint, if any, and return the number of finished steps.

    Raises:
        ArtifactError: The checkpoint was trained on other data, or in another order.
    """
    saved = load_latest(output / CHECKPOINTS, world.device)
    if saved is None:
        return 0
    _check_data(saved.get("data", {}), run.data_state(saved["step"]), output / CHECKPOINTS)
    state.load_state_dict(saved)
    logger.info("resuming from step %d", saved["step"])
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
        # The last checkpoint stays in the artifact as its training state. Earlier, one spare is kept.
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
