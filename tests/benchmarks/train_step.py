"""Time and memory of a training step: DPAR beside LlamaGen, on the same tokens, in turns, in one process.

Real steps of the training loop (bfloat16 autocast, clipping, AdamW) on random tokens, 256 an image, cut into patches of
1.81 tokens. The gate is the paper's promise: time goes down as far as the multiply-accumulates of the linear layers do.
Our LlamaGen is compared with the published training step too, which starts from the same weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from model_sizes import BOTH, DPARS, GPTS, codebook_size
from published_llamagen import PublishedLlamaGen, published_step
from report import report
from timing import interleaved
from torch import nn

from conf.section import Precision, TrainingConfig
from models.config import DPARConfig, GPTConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.macs import dpar_cost, gpt_cost
from models.packed_patches import pack_patches
from models.patching import PatchRule, patch_starts
from pipeline.bench.gates import Gate, gate
from stages.runtime.distributed import World
from stages.training.data import GPTObjective, TokenBatch
from stages.training.loop import Training, train_step
from stages.training.patched import DPARObjective, PatchedBatch
from stages.training.state import TrainingState
from stages.training.stream import Part

TOKENS, CLASSES, MEAN_LENGTH = 256, 1000, 1.81
FAMILIES = ("llamagen", "dpar")
PUBLISHED = "published"
CPU = World(rank=0, size=1, device=torch.device("cpu"))
TIME_BOUND, MEMORY_BOUND = 1.05, 1.1
PUBLISHED_BOUND, EXACT_BOUND = 0.92, 1e-5

Step = Callable[[], object]


@dataclass(frozen=True)
class Task:
    """Size of the models, images in a batch, and dtype of the products."""

    size: str
    images: int
    precision: Precision

    @property
    def codes(self) -> int:
        """Size of the codebook."""
        return codebook_size(self.size)

    @property
    def shape(self) -> dict[str, Any]:
        """Settings of both families beside the size."""
        return {"codebook_size": self.codes, "num_tokens": TOKENS, "num_classes": CLASSES}

    def dpar(self) -> DPARConfig:
        """Config of DPAR."""
        return DPARConfig(**asdict(DPARS[self.size]), **self.shape)

    def gpt(self) -> GPTConfig:
        """Config of LlamaGen."""
        return GPTConfig(**asdict(GPTS[self.size]), **self.shape)


def batch(task: Task) -> PatchedBatch:
    """Random tokens, cut where random entropies exceed the threshold that gives the mean patch length."""
    generator = torch.Generator().manual_seed(0)
    entropies = torch.rand(task.images, TOKENS, generator=generator)
    candidates = (patch_starts(PatchRule(th / 1000, 4, True, 16), entropies) for th in range(1000))
    wanted = task.images * (TOKENS - 1) / MEAN_LENGTH
    starts = min(candidates, key=lambda starts: abs(int(starts[:, :-1].sum()) - wanted))
    tokens = torch.randint(task.codes, (task.images, TOKENS), generator=generator)
    labels = torch.randint(CLASSES, (task.images,), generator=generator)
    return PatchedBatch(tokens, labels, pack_patches(starts))


def training_step(family: str, task: Task) -> Step:
    """One optimiser step of a fresh model."""
    torch.manual_seed(0)
    patched = batch(task)
    model: nn.Module
    objective: nn.Module
    if family == "dpar":
        data: TokenBatch = patched
        model = dpar = DPAR(task.dpar())
        objective = DPARObjective(dpar)
    else:
        data = TokenBatch(patched.tokens, patched.labels)
        model = gpt = GPT(task.gpt())
        objective = GPTObjective(gpt)
    config = TrainingConfig(steps=1_000_000, precision=task.precision)
    run = Training(
        model=model,
        objective=objective,
        batch=lambda step, part: data,
        data_state=lambda steps: {},
        validate=dict,
        config=config,
        seed=0,
    )
    state = TrainingState(model, {}, config)
    objective.train()
    return lambda: train_step(run, objective, state, [(Part(0, task.images), data)], 0, CPU)


def llamagen_published(task: Task) -> tuple[Step, float]:
    """An optimiser step of the published training, and by how much its float32 loss differs from ours."""
    torch.manual_seed(0)
    ours, data = GPT(task.gpt()).eval(), batch(task)
    nn.init.normal_(ours.output.weight, std=0.02)
    theirs = PublishedLlamaGen.like(ours).eval()
    with torch.no_grad():
        difference = theirs.loss(data.tokens, data.labels) - ours.loss(data.tokens, data.labels)
    bfloat16 = task.precision == "bfloat16"
    return published_step(theirs, data.tokens, data.labels, bfloat16=bfloat16), abs(float(difference))


def linear_macs(family: str, task: Task) -> float:
    """Multiply-accumulates of the linear layers of one image's forward pass."""
    if family == "dpar":
        return dpar_cost(task.dpar(), MEAN_LENGTH).forward.linear
    return gpt_cost(task.gpt()).forward.linear


def shares(step: Step) -> dict[str, float]:
    """Share of a step's time by what it is spent on."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    spent: dict[str, float] = {}
    for event in profile.events():
        kind = kind_of(event)
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: time / total for kind, time in sorted(spent.items(), key=lambda item: -item[1])}


def kind_of(event: Any) -> str:
    """What an operation belongs to, by its name and by the names of what called it."""
    name, ancestors = event.name, []
    while event is not None:
        ancestors.append(event.name)
        event = event.cpu_parent
    if name in ("aten::mm", "aten::addmm"):
        return "linear layers"
    if any("HeadCrossEntropy" in one or "embedding" in one for one in ancestors):
        return "embedding and loss"
    if name in ("aten::bmm", "aten::masked_fill_") or "softmax" in name or "scaled_dot_product" in name:
        return "attention"
    if any("AdamW" in one or "adamw" in one or ("norm" in one and "linalg" in one) for one in ancestors):
        return "optimiser"
    return "norms, dropout, casts, rotary"


def peak_bytes(family: str, task: Task) -> int:
    """Largest memory of a process that trains three steps, beyond what it held before the model was made."""
    options = {"--peak": family, "--sizes": task.size, "--images": task.images, "--precision": task.precision}
    command = [sys.executable, __file__, *(str(word) for option in options.items() for word in option)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(family: str, task: Task) -> None:
    """What `peak_bytes` asks for, in a process of its own."""
    before = resident_peak()
    step = training_step(family, task)
    for _ in range(3):
        step()
    print(resident_peak() - before)


def resident_peak() -> int:
    """The most bytes this process ever held. Not of getrusage, which counts those of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure(task: Task, rounds: int) -> tuple[list[Gate], dict[str, dict[str, float]]]:
    """Gates and figures of one size; a column a model."""
    peaks = {family: peak_bytes(family, task) for family in FAMILIES}
    made = {family: training_step(family, task) for family in FAMILIES}
    published, difference = llamagen_published(task)
    for step in (*made.values(), published):
        step()  # the first step allocates, and is several times slower
    seconds = interleaved(made | {PUBLISHED: published}, rounds)
    macs = {family: linear_macs(family, task) for family in FAMILIES}
    columns = {}
    for family, step in made.items():
        columns[f"{family}-{task.size}"] = {
            "seconds a step": seconds[family],
            "GMAC an image, linear layers": macs[family] / 1e9,
            "peak memory, GB": peaks[family] / 1e9,
            **{f"share of time: {kind}": share for kind, share in shares(step).items()},
        }
    columns[f"published LlamaGen-{task.size}"] = {"seconds a step": seconds[PUBLISHED]}
    time_ratio, mac_ratio, memory_ratio = (x["dpar"] / x["llamagen"] for x in (seconds, macs, peaks))
    ours = f"LlamaGen-{task.size} / published LlamaGen-{task.size}"
    pair = f"DPAR-{task.size} / LlamaGen-{task.size}"
    return [
        gate(f"{pair}, step time / MACs", time_ratio / mac_ratio, "<", TIME_BOUND),
        gate(f"{pair}, peak memory", memory_ratio, "<", MEMORY_BOUND),
        gate(f"{ours}, step time", seconds["llamagen"] / seconds[PUBLISHED], "<", PUBLISHED_BOUND),
        gate(f"{ours}, difference of the losses in float32", difference, "<", EXACT_BOUND),
    ], columns


def main() -> None:
    """Measure each size and print what was found."""
    parser = argparse.ArgumentParser(description="Time and memory of a training step, DPAR beside LlamaGen.")
    parser.add_argument("--sizes", nargs="+", default=["B", "L"], choices=BOTH)
    parser.add_argument("--images", type=int, default=8, help="Images in a batch.")
    parser.add_argument("--precision", choices=get_args(Precision), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", choices=FAMILIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    tasks = [Task(size, options.images, options.precision) for size in options.sizes]
    if options.peak:
        print_peak(options.peak, *tasks)
        return
    gates: list[Gate] = []
    columns: dict[str, dict[str, float]] = {}
    for task in tasks:
        of_size, of_columns = measure(task, options.rounds)
        gates, columns = gates + of_size, columns | of_columns
    report(gates, columns)


if __name__ == "__main__":
    main()
