"""The training loop of every model: forward, backward, step, log, checkpoint.

The random state of a micro-batch is seeded from (seed, step, place in the global batch). Weights, optimisers and the
step number are therefore the whole state: a killed run resumes from its last checkpoint and ends with the same weights,
bit for bit on CPU. The number of processes may change when a run resumes.

Auxiliary modules, e.g. a discriminator or an entropy head, are trained in the same step as the model. The objective
adds all losses, so one backward pass gives every gradient; then each optimiser takes its step. The discriminator's loss
has no gradient in the model, and the model's adversarial loss has none in the discriminator. The discriminator sees the
model's output from before the model's step, so this equals the usual alternating training of GANs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from conf.runtime import RuntimeConfig
from conf.section import TrainingConfig
from stages.runtime.artifact import RECORD
from stages.runtime.distributed import (
    World,
    all_reduce_sum,
    barrier,
    data_parallel,
    own_gradients,
)
from stages.runtime.errors import ArtifactError, Interrupted
from stages.runtime.heap import Heap
from stages.runtime.interruption import Interruption
from stages.runtime.prefetch import prefetch
from stages.runtime.progress import Progress
from stages.runtime.randomness import Purpose, seed_torch
from stages.training.checkpoint import load_latest, require_same, save_checkpoint
from stages.training.compiled import compile_as_set
from stages.training.finite import FiniteWatch
from stages.training.log import MetricLog
from stages.training.meter import Meter, matmul_rate
from stages.training.micro_batches import check_micro_batch, micro_batch, try_pass
from stages.training.optim import learning_rate
from stages.training.recomputed import recompute_blocks
from stages.training.state import TrainingState
from stages.training.stream import Part, divided, share_of

logger = logging.getLogger(__name__)
Batch = TypeVar("Batch")
CHECKPOINTS = Path(RECORD) / "checkpoints"


@dataclass(frozen=True)
class Preview:
    """Pictures of samples while training goes on: `draw` is called on rank 0 with the number of finished steps."""

    every: int
    draw: Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Training(Generic[Batch]):
    """A training run: everything that differs between models.

    Attributes:
        model: The trained model, whose weights are kept.
        objective: Module that contains all trained weights. `objective(batch)` gives the loss, a mean over the images
            of the batch, and named scalars to log.
        batch: The images at some places of a step's global batch. It is prepared in a thread.
        data_state: State of the data after a number of steps: seed, samples seen, digests. It is saved in checkpoints,
            and a checkpoint with another state is an error.
        validate: Held-out metrics, computed every `checkpoint_every` steps.
        config: Steps, batch size, optimiser.
        seed: Seed of dropout and of all other randomness in the forward pass.
        restarts: Steps at which the learning rate schedule starts again.
        auxiliary: Modules in `objective` that are trained besides `model`, by name. Each has its own optimiser and
            gradient norm. Every parameter needs a gradient at every step, even if it is zero. No average is kept of
            them.
        samples: Numbers of the images at some places of a step's global batch, for the report of a non-finite loss.
        counts: Numbers of tokens and patches of a batch, by name.
        macs: MACs of one image's forward pass at a step, given the mean counts of its batches; None if unknown.
        preview: Pictures to draw while training goes on.
    """

    model: nn.Module
    objective: nn.Module
    batch: Callable[[int, Part], Batch]
    data_state: Callable[[int], dict[str, int | str]]
    validate: Callable[[], dict[str, float]]
    config: TrainingConfig
    seed: int
    restarts: tuple[int, ...] = ()
    auxiliary: Mapping[str, nn.Module] = field(default_factory=dict)
    samples: Callable[[int, Part], dict[str, list[int]]] = lambda step, part: {}
    counts: Callable[[Batch], Mapping[str, int]] = lambda batch: {}
    macs: Callable[[int, Mapping[str, float]], float | None] = lambda step, counts: None
    preview: Preview | None = None


def train_model(run: Training[Any], output: Path, world: World, runtime: RuntimeConfig) -> dict[str, float]:
    """Train to the last step, from the last checkpoint if there is one, and return the final held-out metrics.

    With an `ema_decay`, held-out metrics use the averaged weights, and `run.model` holds the averaged weights at the
    end.

    Raises:
        InputError: The settings do not fit the machine or each other.
        ArtifactError: The last checkpoint belongs to other data or to other settings.
        Interrupted: A signal asked for a stop; a checkpoint was written.
        RuntimeError: A loss or a gradient is not finite, or the GPU has too little memory.
    """
    return _Loop(run, output, world, runtime).train()


def train_step(
    run: Training[Any],
    objective: nn.Module,
    state: TrainingState,
    batches: Sequence[tuple[Part, Any]],
    step: int,
    world: World,
    watch: FiniteWatch | None = None,
) -> dict[str, Tensor]:
    """One step of every optimiser, on the micro-batches of this process.

    The gradient is that of the mean loss of all images. The named scalars are means over the images too. They stay on
    the device, because reading them would force a sync.
    """
    images = sum(part.count for part, _ in batches)
    bfloat16 = run.config.precision == "bfloat16"
    means: dict[str, Tensor] = {}
    state.zero_grad()
    for number, (part, batch) in enumerate(batches, 1):
        seed_torch(run.seed, Purpose.TRAINING_STEP, step, part.first)
        with nullcontext() if number == len(batches) else own_gradients(objective):
            with torch.autocast(world.device.type, torch.bfloat16, enabled=bfloat16):
                loss, scalars = objective(batch)
            weight = part.count / images
            (loss * weight).backward()
        if watch is not None:
            watch.see_loss(loss.detach(), step, part)
        for name, value in {"loss": loss.detach(), **scalars}.items():
            means[name] = means[name] + value * weight if name in means else value * weight
    rate = learning_rate(step, run.config, run.restarts)
    norms = state.step(rate)
    if watch is not None:
        for norm in norms.values():
            watch.see_gradient(norm, step)
    return {"loss": means.pop("loss"), **norms, "learning_rate": torch.tensor(rate), **means}


class _Loop:
    """A training run on this machine."""

    def __init__(self, run: Training[Any], output: Path, world: World, runtime: RuntimeConfig) -> None:
        self.run, self.output, self.world, self.config = run, output, world, run.config
        share = share_of(self.config.global_batch_size, world)
        check_micro_batch(runtime.micro_batch, share)
        run.objective.to(world.device)
        compile_as_set(run.objective, runtime.compile, world.device)
        if runtime.checkpoint_activations:
            recompute_blocks(run.objective)
        self.state = TrainingState(run.model, run.auxiliary, self.config)
        self.first, before = self._resume()
        run.objective.train()
        self.micro_batch = micro_batch(runtime.micro_batch, before, share, self._try, world)
        self.parts = divided(share, self.micro_batch)
        self.objective = data_parallel(run.objective, world)
        self.watch = FiniteWatch(self.config.global_batch_size, self.micro_batch, world)
        self.log = MetricLog(output, self.first, enabled=world.is_main)
        self.progress = Progress(output, "steps", self.config.steps, done=self.first, enabled=world.is_main)
        self.meter, self.counts = Meter(world, self._peak()), Counter[str]()
        self.heap = Heap()
        self.interruption = Interruption(world, runtime.checkpoint_minutes)

    def train(self) -> dict[str, float]:
        """All steps that are left, then the held-out metrics."""
        steps = range(self.first, self.config.steps)
        with self.interruption.caught(), prefetch(self._batches, steps, threads=1, depth=1) as batches:
            for step, micro_batches in enumerate(self.meter.waiting(batches), self.first):
                self._after(step + 1, self._step(micro_batches, step))
        return self._finish()

    def _batches(self, step: int) -> list[tuple[Part, Any]]:
        return [(part, self.run.batch(step, part)) for part in self.parts]

    def _step(self, micro_batches: list[tuple[Part, Any]], step: int) -> dict[str, Tensor]:
        try:
            metrics = train_step(self.run, self.objective, self.state, micro_batches, step, self.world, self.watch)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"the GPU ran out of memory in step {step + 1} with micro-batches of {self.micro_batch} images: set "
                f"runtime.micro_batch={max(1, self.micro_batch // 2)} or runtime.checkpoint_activations=true"
            ) from error
        for part, batch in micro_batches:
            self.counts.update({"images": part.count, **self.run.counts(batch)})
        return metrics

    def _after(self, done: int, metrics: dict[str, Tensor]) -> None:
        """What is due after a step. A checkpoint comes before the held-out loss, which may take minutes."""
        is_last, at_interval = done == self.config.steps, done % self.config.checkpoint_every == 0
        if done % self.config.log_every == 0 or is_last:
            self._report(done, metrics)
        agreed = self.interruption.agree()
        with self.meter.paused():
            if is_last or at_interval or agreed.save or agreed.stop:
                self._save(done)
            if agreed.stop:
                raise Interrupted(agreed.stop, done, self.config.steps)
            if at_interval and not is_last:
                with self.state.averaged():
                    self.log.write(done, self._validate())
            if self.run.preview is not None and self.world.is_main and done % self.run.preview.every == 0:
                with self.state.averaged():
                    self.run.preview.draw(done)

    def _report(self, done: int, metrics: dict[str, Tensor]) -> None:
        self.watch.require_finite(self.run.samples, self.output)
        counts = {f"count {name}": torch.tensor(float(count)) for name, count in self.counts.items()}
        numbers = _mean_over_ranks(metrics | counts, self.world)
        counted = {name: numbers.pop(f"count {name}") for name in self.counts}
        self.counts.clear()
        macs = self.run.macs(done - 1, counted) if self.world.is_main else None
        self.log.write(done, numbers | self.meter.report(counted, macs))
        self.heap.trim()
        self.progress.update(done, f"loss {numbers['loss']:.4f}")

    def _save(self, done: int) -> None:
        self.watch.require_finite(self.run.samples, self.output)
        if self.world.is_main:
            saved = self.state.state_dict() | {
                "step": done,
                "data": self.run.data_state(done),
                "settings": self.config.key_fields(),
                "micro_batch": self.micro_batch,
            }
            # The last checkpoint stays in the artifact as its training state. Earlier, one spare is kept.
            save_checkpoint(self.output / CHECKPOINTS, done, saved, keep=1 if done == self.config.steps else 2)
        barrier()
        self.interruption.saved()

    def _resume(self) -> tuple[int, int | None]:
        """Load the newest checkpoint, if any. Returns the number of finished steps, and their micro-batch.

        Raises:
            ArtifactError: The checkpoint was trained on other data, in another order or with other settings.
        """
        folder = self.output / CHECKPOINTS
        saved = load_latest(folder, self.world.device)
        if saved is None:
            return 0, None
        require_same("data", saved["data"], self.run.data_state(saved["step"]), folder)
        require_same("settings", saved["settings"], self.config.key_fields(), folder)
        try:
            self.state.load_state_dict(saved)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ArtifactError(
                f"the checkpoints in {folder} are of another model ({' '.join(str(error).split())[:200]}): remove them "
                "to train from the start"
            ) from error
        logger.info("resuming from step %d", saved["step"])
        return int(saved["step"]), int(saved["micro_batch"])

    def _finish(self) -> dict[str, float]:
        with self.state.averaged():
            final = self._validate()
        self.log.write(self.config.steps, final)
        self.state.keep_average()
        return final

    def _validate(self) -> dict[str, float]:
        self.run.objective.eval()
        with torch.no_grad():
            metrics = self.run.validate()
        self.run.objective.train()
        return metrics

    def _try(self, images: int) -> None:
        """A pass of the last step, which has the longest sequences and every loss."""
        step = self.config.steps - 1
        batch = self.run.batch(step, Part(0, images))
        seed_torch(self.run.seed, Purpose.TRAINING_STEP, step)
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            try_pass(self.run.objective, batch, self.world.device, self.state.unmade_bytes)

    def _peak(self) -> float | None:
        """FLOP/s of matrix products in the type that the model computes in, on rank 0, which reports them."""
        return matmul_rate(self.world.device, getattr(torch, self.config.precision)) if self.world.is_main else None


def _mean_over_ranks(metrics: dict[str, Tensor], world: World) -> dict[str, float]:
    stacked = torch.stack([value.float().to(world.device) for value in metrics.values()])
    means = (all_reduce_sum(stacked) / world.size).tolist()
    return dict(zip(metrics, means, strict=True))
