"""Guidance over time: the rule by hand, and what the samplers make of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.boundaries import GivenBoundaries
from models.dpar import DPAR
from models.gpt import GPT
from models.guidance import Schedule, guidance_scale
from models.packed_patches import pack_patches
from models.patching import static_patch_starts
from models.sampling import sample_dpar, sample_gpt
from models.token_sampling import SamplingOptions

TOKENS, CLASSES = 16, 5


def scales(scale: float, schedule: Schedule = "constant", interval: tuple[int, int] | None = None) -> list[float]:
    return [guidance_scale(position, 5, scale, schedule, interval) for position in range(5)]


def test_constant_guidance_is_the_scale_everywhere() -> None:
    assert scales(2.0) == [2.0] * 5


def test_linear_guidance_rises_from_none_to_the_scale() -> None:
    assert scales(3.0, "linear") == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert guidance_scale(0, 1, 3.0, "linear") == 1.0


def test_outside_of_the_interval_there_is_no_guidance() -> None:
    assert scales(2.0, interval=(1, 3)) == [1.0, 2.0, 2.0, 1.0, 1.0]
    assert scales(3.0, "linear", (1, 3)) == [1.0, 1.5, 2.0, 1.0, 1.0], "the schedule spans the image, not the interval"


@pytest.mark.parametrize("cfg_interval", [0, 2, 3])
def test_llamagens_interval_is_from_the_first_token_to_two_more(cfg_interval: int) -> None:
    # LlamaGen: the class gives token 0 with guidance; cached step i gives token i + 1, guided unless i > cfg_interval.
    published = [2.0] + [2.0 if step <= cfg_interval else 1.0 for step in range(4)]
    assert scales(2.0, interval=(0, cfg_interval + 2)) == published


def tokens_and_logits(model: GPT | DPAR, options: SamplingOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Likeliest tokens as sampled, and both halves' logits of whole forwards over them."""
    labels = torch.arange(4)
    null, uniforms = torch.full_like(labels, CLASSES), torch.zeros(4, TOKENS)
    if isinstance(model, GPT):
        tokens = sample_gpt(model, labels, uniforms, options)
        return tokens, model(tokens, labels), model(tokens, null)
    static = static_patch_starts(1.8, TOKENS)
    tokens, starts = sample_dpar(model, labels, uniforms, options, GivenBoundaries(static))
    patches = pack_patches(starts)
    return tokens, model(tokens, labels, patches), model(tokens, null, patches)


@pytest.mark.parametrize("family", ["gpt", "dpar"])
@pytest.mark.parametrize(("schedule", "interval"), [("linear", None), ("constant", (3, 11)), ("linear", (3, 11))])
@torch.inference_mode()
def test_sampled_tokens_follow_the_scale_of_their_place(
    family: str,
    schedule: Schedule,
    interval: tuple[int, int] | None,
    gpt: Callable[..., GPT],
    dpar: Callable[..., DPAR],
) -> None:
    model = gpt(CLASSES) if family == "gpt" else dpar()
    options = SamplingOptions(cfg_scale=4.0, cfg_schedule=schedule, cfg_interval=interval, top_k=1)
    tokens, conditional, unconditional = tokens_and_logits(model, options)
    scale = torch.tensor([guidance_scale(place, TOKENS, 4.0, schedule, interval) for place in range(TOKENS)])[:, None]
    assert torch.equal(tokens, (unconditional + scale * (conditional - unconditional)).argmax(dim=-1))
    everywhere = unconditional + 4.0 * (conditional - unconditional)
    assert not torch.equal(tokens, everywhere.argmax(dim=-1)), "the schedule must matter here"
