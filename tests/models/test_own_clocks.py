"""Images on own clocks are those of the lockstep sampler, in any number of slots, on a CPU and by what a GPU runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lockstep
import pytest
import torch
from torch import Tensor

from models import kv_cache, sampling
from models.boundaries import Boundaries, EntropyBoundaries, GivenBoundaries, HeadBoundaries, OwnEntropyBoundaries
from models.canvas import Canvas
from models.clocks import Clocks
from models.config import EntropyHeadConfig
from models.dpar import DPAR
from models.dpar_steps import GLOBAL, TOKEN, DPARSteps
from models.entropy_head import EntropyHead
from models.gpt import GPT
from models.gpt_steps import GPTSteps
from models.patching import PatchRule, patch_starts
from models.sampling import sample_dpar, sample_gpt
from models.token_sampling import SamplingOptions

GRID, TOKENS, CODES, CLASSES, IMAGES = 4, 16, 40, 5, 11
OPTIONS = (
    SamplingOptions(),
    SamplingOptions(cfg_scale=2.5, top_k=20),
    SamplingOptions(cfg_scale=3.0, cfg_schedule="linear", cfg_interval=(2, 12)),
)
SOURCES = ("given", "static", "entropy model", "entropy head", "own entropy")


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.inference_mode():
        yield


def drawn() -> tuple[Tensor, Tensor]:
    """Labels and uniform numbers."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CLASSES, (IMAGES,), generator=generator), torch.rand(IMAGES, TOKENS, generator=generator)


@pytest.fixture(scope="module")
def source(rough: Callable[[Any], Any], gpt: Callable[..., GPT]) -> Callable[[str, DPAR], Boundaries]:
    """Boundaries that open patches at other tokens in each image."""
    entropies = torch.rand(IMAGES, TOKENS, generator=torch.Generator().manual_seed(2))
    starts = patch_starts(PatchRule(0.6, 4, False, GRID), entropies)

    def make(name: str, model: DPAR) -> Boundaries:
        if name in ("given", "static"):
            return GivenBoundaries(starts if name == "given" else starts[0])
        if name == "entropy model":
            return EntropyBoundaries(gpt(None), PatchRule(3.5, 4, True, GRID))
        if name == "own entropy":
            return OwnEntropyBoundaries(PatchRule(3.3, 3, True, GRID))
        head = rough(EntropyHead(EntropyHeadConfig.of(model.config, "block")))
        return HeadBoundaries(head, PatchRule(1.7, None, True, GRID))

    return make


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", SOURCES)
def test_images_of_dpar_are_those_in_lockstep(
    name: str, options: SamplingOptions, dpar: Callable[..., DPAR], source: Callable[[str, DPAR], Boundaries]
) -> None:
    model, (labels, uniforms) = dpar(), drawn()
    boundaries, prefix = source(name, model), (uniforms[:, :5] * CODES).long()
    tokens, starts = lockstep.sample_dpar(model, labels, uniforms, options, boundaries)
    assert name == "static" or len(set(starts.sum(1).tolist())) > 1, "images must be at different positions"
    for batch in (1, 3, None):
        again, starts_again = sample_dpar(model, labels, uniforms, options, boundaries, batch=batch)
        assert torch.equal(again, tokens)
        assert torch.equal(starts_again, starts)
    continued = lockstep.sample_dpar(model, labels, uniforms, options, boundaries, prefix)
    found = sample_dpar(model, labels, uniforms, options, boundaries, prefix, batch=3)
    assert torch.equal(found[0], continued[0])
    assert torch.equal(found[1], continued[1])


@pytest.mark.parametrize("options", OPTIONS)
def test_images_of_llamagen_are_those_in_lockstep(options: SamplingOptions, gpt: Callable[..., GPT]) -> None:
    model, (labels, uniforms) = gpt(CLASSES), drawn()
    tokens = lockstep.sample_gpt(model, labels, uniforms, options)
    for batch in (1, 4, None):
        assert torch.equal(sample_gpt(model, labels, uniforms, options, batch=batch), tokens)
    prefix = tokens[:, :5].flip(1)
    continued = lockstep.sample_gpt(model, labels, uniforms, options, prefix)
    assert torch.equal(sample_gpt(model, labels, uniforms, options, prefix, batch=4), continued)


class Counts:
    """`LateCounts` without a GPU: the counts before the latest tick."""

    def __init__(self, counts: Tensor) -> None:
        self._counts, self._kept = counts, [counts.tolist()]

    def copy(self) -> None:
        self._kept.append(self._counts.tolist())

    def read(self) -> list[int]:
        return self._kept[max(0, len(self._kept) - 2)]


@pytest.fixture
def _as_a_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full batches with the spare slot, counts one tick late, one attention kernel, pooling of the longest patch."""
    plain = Clocks.__init__

    def start(self: Clocks, *arguments: Any) -> None:
        plain(self, *arguments)
        self.exact = False

    monkeypatch.setattr(Clocks, "__init__", start)
    monkeypatch.setattr(sampling, "Replay", lambda function: function)
    monkeypatch.setattr(sampling, "LateCounts", Counts)
    monkeypatch.setattr(kv_cache, "_PagedSums", kv_cache._OneKernel)
    monkeypatch.setattr(DPARSteps, "_longest", lambda self, lengths: self._boundaries.longest)


@pytest.mark.slow
@pytest.mark.usefixtures("_as_a_gpu_does", "without_shape_checks")
@pytest.mark.parametrize("name", SOURCES)
def test_what_a_gpu_runs_draws_the_same_images_of_dpar(
    name: str, dpar: Callable[..., DPAR], source: Callable[[str, DPAR], Boundaries]
) -> None:
    model, (labels, uniforms) = dpar(), drawn()
    boundaries = source(name, model)
    for options in OPTIONS:
        tokens, starts = lockstep.sample_dpar(model, labels, uniforms, options, boundaries)
        again, starts_again = sample_dpar(model, labels, uniforms, options, boundaries, batch=3)
        assert torch.equal(again, tokens)
        assert torch.equal(starts_again, starts)


@pytest.mark.usefixtures("_as_a_gpu_does", "without_shape_checks")
def test_a_gpu_replays_the_steps_that_repeat_and_reads_a_prefix_as_it_is(
    dpar: Callable[..., DPAR], source: Callable[[str, DPAR], Boundaries], monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed: list[int] = []

    def replay(tick: partial[Any]) -> partial[Any]:
        replayed.extend(tick.args)
        return tick

    monkeypatch.setattr(sampling, "Replay", replay)
    model, (labels, uniforms) = dpar(), drawn()
    prefix, boundaries = (uniforms[:, :5] * CODES).long(), source("entropy head", model)
    tokens, starts = lockstep.sample_dpar(model, labels, uniforms, OPTIONS[1], boundaries, prefix)
    again, starts_again = sample_dpar(model, labels, uniforms, OPTIONS[1], boundaries, prefix, batch=3)
    assert torch.equal(again, tokens)
    assert torch.equal(starts_again, starts)
    assert replayed == [TOKEN, GLOBAL]


@pytest.mark.usefixtures("_as_a_gpu_does", "without_shape_checks")
def test_what_a_gpu_runs_draws_the_same_images_of_llamagen(gpt: Callable[..., GPT]) -> None:
    model, (labels, uniforms) = gpt(CLASSES), drawn()
    for options in OPTIONS:
        tokens = lockstep.sample_gpt(model, labels, uniforms, options)
        assert torch.equal(sample_gpt(model, labels, uniforms, options, batch=4), tokens)


@pytest.mark.parametrize("as_a_gpu", [False, True])
def test_finished_images_are_given_once(
    as_a_gpu: bool, gpt: Callable[..., GPT], request: pytest.FixtureRequest
) -> None:
    if as_a_gpu:
        request.getfixturevalue("_as_a_gpu_does")
    labels, uniforms = drawn()
    canvas = Canvas(labels, uniforms, OPTIONS[0], CLASSES, None)
    found = sampling.Sampling(canvas, GPTSteps, gpt(CLASSES), None, batch=4)
    given = [image for finished in found for image in finished.tolist()]
    assert given == list(range(IMAGES))
