"""Cached sampling: its logits are those of the full forward, its boundaries those of the patch index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached_logits import cached_logits
from torch import Tensor

from models.boundaries import EntropyBoundaries, GivenBoundaries
from models.config import GPTConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.packed_patches import pack_patches
from models.patching import PatchRule, patch_starts, static_patch_starts
from models.sampling import sample_dpar, sample_gpt
from models.token_sampling import SamplingOptions

GRID, TOKENS, CODES, CLASSES = 4, 16, 40, 5
PLAIN, GUIDED = SamplingOptions(), SamplingOptions(cfg_scale=2.5)


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.inference_mode():
        yield


def batch(images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, uniform numbers and ragged starts."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    uniforms = torch.rand(images, TOKENS, generator=generator)
    starts = patch_starts(PatchRule(0.6, 4, False, GRID), torch.rand(images, TOKENS, generator=generator))
    assert len(set(starts.sum(1).tolist())) > 2, "the batch must be ragged"
    return labels, uniforms, starts


def full_logits(model: DPAR, tokens: Tensor, labels: Tensor, starts: Tensor, options: SamplingOptions) -> Tensor:
    """Guided logits of every position by whole forwards."""
    patches = pack_patches(starts)
    conditional = model(tokens, labels, patches)
    unconditional = model(tokens, torch.full_like(labels, CLASSES), patches)
    return unconditional + options.cfg_scale * (conditional - unconditional)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("options", [PLAIN, GUIDED])
@pytest.mark.parametrize("position_embedding", ["dynamic", "dynamic_no_redundancy", "patch_index_1d"])
def test_cached_logits_are_those_of_the_full_forward(
    position_embedding: str, options: SamplingOptions, batch_size: int, dpar: Callable[..., DPAR]
) -> None:
    model = dpar(position_embedding=position_embedding)
    labels, uniforms, starts = batch(8)
    tokens = (uniforms * CODES).long()
    cached = cached_logits(model, tokens, labels, GivenBoundaries(starts), options, batch_size)
    expected = full_logits(model, tokens, labels, starts, options)
    tolerance = 1e-4 if options.guided else 1e-5  # guidance multiplies rounding errors
    torch.testing.assert_close(cached, expected, atol=tolerance, rtol=tolerance)


def test_weights_in_bfloat16_give_float32_logits_near_the_exact_ones(dpar: Callable[..., DPAR]) -> None:
    labels, uniforms, starts = batch(8)
    tokens = (uniforms * CODES).long()
    exact, rounded = (
        cached_logits(model, tokens, labels, GivenBoundaries(starts), PLAIN, 3) for model in (dpar(), dpar().bfloat16())
    )
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.3 * exact.std()


def test_boundaries_decided_while_drawing_are_those_of_the_patch_index(
    dpar: Callable[..., DPAR], gpt: Callable[..., GPT]
) -> None:
    model, entropy_model = dpar(), gpt(None)
    labels, uniforms, _ = batch(8)
    entropies = entropy_model.entropy(sample_gpt(gpt(CLASSES), labels, uniforms, PLAIN))[:, 1:].flatten().sort().values
    rule = PatchRule(float(entropies[len(entropies) // 2]), 3, True, GRID)
    tokens, starts = sample_dpar(model, labels, uniforms, GUIDED, EntropyBoundaries(entropy_model, rule))
    found = entropy_model.entropy(tokens)
    assert ((found[:, 1:] - rule.threshold).abs() > 1e-5).all(), "an entropy on the threshold could fall either way"
    assert torch.equal(starts, patch_starts(rule, found))
    assert len(set(starts.sum(1).tolist())) > 1


@pytest.mark.parametrize("options", [PLAIN, GUIDED])
def test_the_likeliest_token_is_that_of_the_full_forward(
    options: SamplingOptions, dpar: Callable[..., DPAR], gpt: Callable[..., GPT]
) -> None:
    greedy = SamplingOptions(cfg_scale=options.cfg_scale, top_k=1)
    labels, uniforms, starts = batch(8)
    model = gpt(CLASSES)
    tokens = sample_gpt(model, labels, uniforms, greedy)
    conditional, unconditional = model(tokens, labels), model(tokens, torch.full_like(labels, CLASSES))
    logits = unconditional + options.cfg_scale * (conditional - unconditional)
    assert torch.equal(tokens, logits.argmax(dim=-1))
    patched = dpar()
    tokens, _ = sample_dpar(patched, labels, uniforms, greedy, GivenBoundaries(starts))
    assert torch.equal(tokens, full_logits(patched, tokens, labels, starts, options).argmax(dim=-1))


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch(dpar: Callable[..., DPAR], gpt: Callable[..., GPT]) -> None:
    labels, uniforms, _ = batch(8)
    model, entropy_model = dpar(), gpt(None)
    rule = PatchRule(3.2, 4, True, GRID)

    def sample(rows: Tensor) -> tuple[Tensor, Tensor]:
        return sample_dpar(model, labels[rows], uniforms[rows], GUIDED, EntropyBoundaries(entropy_model, rule))

    tokens, starts = sample(torch.arange(8))
    for rows in (torch.tensor([5]), torch.tensor([6, 2, 7])):
        again, starts_again = sample(rows)
        assert torch.equal(again, tokens[rows])
        assert torch.equal(starts_again, starts[rows])
    whole = sample_gpt(gpt(CLASSES), labels, uniforms, GUIDED)
    assert torch.equal(sample_gpt(gpt(CLASSES), labels[3:5], uniforms[3:5], GUIDED), whole[3:5])


@pytest.mark.slow
def test_one_entropy_model_serves_batch_after_batch(dpar: Callable[..., DPAR], gpt: Callable[..., GPT]) -> None:
    labels, uniforms, _ = batch(8)
    model, boundaries = dpar(), EntropyBoundaries(gpt(None), PatchRule(3.2, 4, True, GRID))
    first = sample_dpar(model, labels, uniforms, PLAIN, boundaries)
    sample_dpar(model, labels[:3], uniforms[3:6], PLAIN, boundaries)
    again = sample_dpar(model, labels, uniforms, PLAIN, boundaries)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_static_boundaries_serve_every_image(dpar: Callable[..., DPAR]) -> None:
    labels, uniforms, _ = batch(8)
    static = static_patch_starts(1.8, TOKENS)
    _, starts = sample_dpar(dpar(), labels, uniforms, PLAIN, GivenBoundaries(static))
    assert torch.equal(starts, static.expand(8, -1))


def test_boundaries_of_other_images_are_refused(dpar: Callable[..., DPAR]) -> None:
    labels, uniforms, starts = batch(8)
    with pytest.raises(ValueError, match=r"boundaries are \(8, 16\), expected \(16,\) or \(3, "):
        sample_dpar(dpar(), labels[:3], uniforms[:3], PLAIN, GivenBoundaries(starts))
    other = GPT(
        GPTConfig(dim=32, num_layers=1, num_heads=2, codebook_size=CODES, num_tokens=GRID, num_classes=None)
    ).eval()
    with pytest.raises(ValueError, match="entropy model is for 4 tokens an image, the sampled model for 16"):
        sample_dpar(dpar(), labels, uniforms, PLAIN, EntropyBoundaries(other, PatchRule(1.0, 4, True, GRID)))


def test_bfloat16_sampling_finishes_with_valid_tokens(dpar: Callable[..., DPAR], gpt: Callable[..., GPT]) -> None:
    labels, uniforms, _ = batch(8)
    boundaries = EntropyBoundaries(gpt(None), PatchRule(3.2, 4, True, GRID))
    with torch.autocast("cpu", torch.bfloat16):
        tokens, starts = sample_dpar(dpar(), labels, uniforms, GUIDED, boundaries)
    assert ((tokens >= 0) & (tokens < CODES)).all()
    assert starts[:, [0, 1, *range(GRID, TOKENS, GRID)]].all()
