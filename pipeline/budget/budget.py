"""The budget of a run: for every stage that the settings run, work, time, disk and memory, and what does not fit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.schema import Settings
from pipeline.budget.cards import Card
from pipeline.budget.costs import Costs
from pipeline.budget.disk import DISKS, Disk
from pipeline.budget.hours import Efficiency, Limit, seconds_of
from pipeline.budget.memory import CONTEXT, Training, forwards, host_memory, trainings
from pipeline.budget.phases import Work
from pipeline.budget.shape import Shape
from pipeline.budget.work import WORK
from pipeline.text import size as in_bytes
from stages.runtime.errors import InputError


@dataclass(frozen=True, kw_only=True)
class StageBudget:
    """What a stage takes.

    Attributes:
        stage: Name.
        work: Work of the stage.
        flops: Floating-point operations, over all devices.
        time: Seconds, and what limits them.
        disk: Bytes on disk.
        device: Bytes on each device: of a training at its largest micro-batch that fits, else at the smallest.
        micro_batch: This micro-batch; None where nothing large is trained, 0 if none fits.
        host: Bytes on the host.
    """

    stage: str
    work: Work
    flops: float
    time: Limit
    disk: Disk
    device: float
    micro_batch: int | None
    host: float


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run takes.

    Attributes:
        card: The device.
        devices: Number of devices.
        shape: Sizes of the run.
        efficiency: Shares of the card's peak that are assumed.
        stages: The stages, in order.
        trainings: Memory of each training, by stage.
    """

    card: Card
    devices: int
    shape: Shape
    efficiency: Efficiency
    stages: tuple[StageBudget, ...]
    trainings: dict[str, Training]

    @property
    def seconds(self) -> float:
        """Time of all stages, one after the other."""
        return sum(stage.time.seconds for stage in self.stages)

    @property
    def disk(self) -> float:
        """Bytes that all artifacts take, and the most that a stage needs besides."""
        return peak_disk([stage.disk for stage in self.stages])


def make_budget(
    settings: Settings, shape: Shape, stages: Sequence[str], card: Card, *, devices: int = 1, mfu: float | None = None
) -> Budget:
    """Plan some stages on a number of cards. Torch counts the operations; nothing is computed.

    Raises:
        InputError: There is more than one CPU.
    """
    if card.is_cpu and devices > 1:
        raise InputError(f"--gpus is {devices} and --gpu cpu, expected 1: all processes share this machine's cores")
    efficiency = Efficiency.of(card, mfu)
    costs = Costs(settings, shape, devices)
    trained = {name: found for name, found in trainings(settings, shape, devices).items() if name in stages}
    passed = forwards(settings, shape)
    host = host_memory(settings, shape, devices, cuda=not card.is_cpu)
    rows = []
    for name in stages:
        work = WORK[name](costs)
        device, micro_batch = _device(trained.get(name), passed.get(name, 0), card)
        rows.append(
            StageBudget(
                stage=name,
                work=work,
                flops=_flops(work, devices),
                time=seconds_of(work, card, devices, efficiency),
                disk=DISKS[name](settings, shape),
                device=device,
                micro_batch=micro_batch,
                host=host[name] + (devices * device if card.is_cpu else 0),
            )
        )
    return Budget(card=card, devices=devices, shape=shape, efficiency=efficiency, stages=tuple(rows), trainings=trained)


def peak_disk(disks: Sequence[Disk]) -> float:
    """Bytes that stages take together, and the most that one of them needs besides while it runs."""
    return sum(disk.kept for disk in disks) + max((disk.extra for disk in disks), default=0)


def usable_memory(card: Card) -> float:
    """Bytes of a device that a stage can use."""
    return card.memory - (0 if card.is_cpu else CONTEXT)


def warnings(budget: Budget, home: Path) -> Iterator[str]:
    """What does not fit: one line for each, with what to do."""
    memory = usable_memory(budget.card)
    for stage in budget.stages:
        needed, name = in_bytes(stage.device), f"a {budget.card.name} has {in_bytes(memory)}"
        if stage.micro_batch == 0:
            yield (
                f"{stage.stage} needs {needed} for one image at a time and {name}: choose a larger card, or try "
                "DPAR_CHECKPOINT_ACTIVATIONS=true, which is not planned here"
            )
        elif stage.micro_batch is None and stage.device > memory:
            yield f"{stage.stage} needs {needed} and {name}: lower {stage.stage}.batch_size"
    free = free_disk(home)
    if budget.disk > free:
        yield f"all artifacts need {in_bytes(budget.disk)} and {home} has {in_bytes(free)} free: set DPAR_HOME"


def free_disk(home: Path) -> int:
    """Free bytes of the file system that holds a folder, which need not exist yet."""
    there = home.absolute()
    return shutil.disk_usage(next(folder for folder in (there, *there.parents) if folder.exists())).free


def _device(training: Training | None, passed: float, card: Card) -> tuple[float, int | None]:
    if training is None:
        return passed, None
    micro_batch = training.largest(usable_memory(card))
    return training.at(micro_batch or 1), micro_batch


def _flops(work: Work, devices: int) -> float:
    return devices * sum(phase.flops for phase in work.phases)
