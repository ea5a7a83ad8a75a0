"""Cached sampling: LlamaGen token by token, and DPAR, whose patch boundaries are decided during sampling.

The caller provides the random numbers, one uniform number for each image and position. Tokens are sampled by the
inverse of the cumulative distribution. So an image depends on its own numbers, and not on the images beside it.

Each image has its own clock, see clocks.py: at every moment the images in flight are at different positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.boundaries import Boundaries
from models.canvas import Canvas
from models.clocks import Clocks, Steps, Usage
from models.dpar import DPAR
from models.dpar_steps import DPARSteps
from models.gpt import GPT
from models.gpt_steps import GPTSteps
from models.replay import LateCounts, Replay
from models.token_sampling import SamplingOptions

_LOOK = 64  # ticks between two looks at which images are finished


@runtime_checkable  # the test suite checks arguments at run time
class StepsOfModel(Protocol):
    """The steps of a kind of model, before they have state: a class of `Steps`."""

    kinds: int

    def __call__(self, model: Any, canvas: Canvas, boundaries: Boundaries | None, slots: int, /) -> Steps:
        """State of as many images as there are slots, and of a spare slot."""


def sample_gpt(
    model: GPT,
    labels: Int[Tensor, " N"],
    uniforms: Float[Tensor, "N T"],
    options: SamplingOptions,
    prefix: Int[Tensor, "N M"] | None = None,
    *,
    batch: int | None = None,
) -> Int[Tensor, "N T"]:
    """Sample tokens from a class-conditional GPT.

    Args:
        model: In evaluation mode.
        labels: Class of each image.
        uniforms: Numbers in [0, 1).
        options: How tokens are sampled.
        prefix: The first M tokens of each image, which are kept.
        batch: Images that take a step together; None for all.

    Raises:
        ValueError: The prefix is for another number of images, or longer than an image.
    """
    canvas = Canvas(labels, uniforms, options, model.cls_embedding.num_classes, prefix)
    return Sampling(canvas, GPTSteps, model, None, batch=batch).finish().tokens


def sample_dpar(
    model: DPAR,
    labels: Int[Tensor, " N"],
    uniforms: Float[Tensor, "N T"],
    options: SamplingOptions,
    boundaries: Boundaries,
    prefix: Int[Tensor, "N M"] | None = None,
    *,
    batch: int | None = None,
) -> tuple[Int[Tensor, "N T"], Bool[Tensor, "N T"]]:
    """Sample tokens from a DPAR model. Returns the tokens and where their patches start.

    Args:
        model: In evaluation mode.
        labels: Class of each image.
        uniforms: Numbers in [0, 1).
        options: How tokens are sampled.
        boundaries: Decides where patches start, inside the prefix too.
        prefix: The first M tokens of each image, which are kept.
        batch: Images that take a step together, of twice as many in flight; None for all.

    Raises:
        ValueError: The prefix or the boundaries are for another number of images or tokens.
    """
    canvas = Canvas(labels, uniforms, options, model.cls_embedding.num_classes, prefix)
    sampling = Sampling(canvas, DPARSteps, model, boundaries, batch=batch).finish()
    return sampling.tokens, sampling.starts


class Sampling:
    """Images that are being sampled. Iterating over it advances them, and gives the numbers of finished ones.

    Where steps are of several kinds, as many images are in flight for each kind as take a step together.
    """

    @torch.inference_mode()
    def __init__(
        self, canvas: Canvas, steps: StepsOfModel, model: Any, boundaries: Boundaries | None, *, batch: int | None
    ) -> None:
        """Sample the images of a canvas; see `sample_dpar` for the other arguments.

        Raises:
            ValueError: The boundaries are for another number of images or tokens.
        """
        batch = batch or canvas.num_images
        slots = min(steps.kinds * batch, canvas.num_images)
        self._canvas = canvas
        self._steps = steps(model, canvas, boundaries, slots)
        self._clocks = Clocks(canvas.num_images, slots, batch, self._steps.kinds, canvas.tokens.device)

    def __iter__(self) -> Iterator[Int[Tensor, " finished"]]:
        """Advance all images to their ends. Gives the numbers of images as they are finished."""
        return self._counted() if self._clocks.exact else self._replayed()

    def _counted(self) -> Iterator[Int[Tensor, " finished"]]:
        """On a CPU all counts are known at once."""
        clocks = self._clocks
        while (kind := clocks.fullest(clocks.waiting.tolist())) is not None:
            images, done = self._tick(kind)
            if done.any():
                yield images[done]

    def _replayed(self) -> Iterator[Int[Tensor, " finished"]]:
        """On a GPU ticks are replayed, counts are those of a tick before, and finished images are asked for rarely."""
        clocks, counts = self._clocks, LateCounts(self._clocks.waiting)
        ticks: list[Callable[[], object]] = [partial(self._tick, kind) for kind in range(self._steps.kinds)]
        always = type(self._steps).kinds  # the step of a prefix is not the same at every call
        ticks[:always] = [Replay(tick) for tick in ticks[:always]]
        given = torch.zeros_like(clocks.finished)
        for number in count(1):
            kind = clocks.fullest(counts.read())
            if kind is not None:
                ticks[kind]()
                counts.copy()
            if kind is None or number % _LOOK == 0:
                finished = clocks.finished & ~given
                given |= finished
                if len(images := finished.nonzero()[:, 0]):
                    yield images
            if kind is None:
                return

    @torch.inference_mode()
    def _tick(self, kind: int) -> tuple[Int[Tensor, " R"], Bool[Tensor, " R"]]:
        """One batch of steps of a kind: its images, and whether they are finished now."""
        clocks = self._clocks
        slots = clocks.take(kind)
        images = clocks.images[slots]
        return images, clocks.put(slots, self._steps.step(kind, slots, images))

    @property
    def tokens(self) -> Int[Tensor, "N T"]:
        """Tokens sampled so far."""
        return self._canvas.tokens[:-1, :-1]

    @property
    def starts(self) -> Bool[Tensor, "N T"]:
        """Where patches start, decided so far."""
        return self._canvas.starts[:-1, :-1]

    @property
    def usage(self) -> Usage:
        """How full the batches were."""
        return self._clocks.usage

    def finish(self) -> Sampling:
        """Advance all images to their ends."""
        for _ in self:
            pass
        return self
