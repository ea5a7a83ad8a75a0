"""Sources of boundaries: each decides while drawing what its entropies and the rule say of the finished image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached_logits import cached_logits
from torch import Tensor

from models.boundaries import (
    Boundaries,
    GivenBoundaries,
    HeadBoundaries,
    NextTokens,
    OwnEntropyBoundaries,
    PrefixTokens,
)
from models.config import EntropyHeadConfig, HeadKind
from models.dpar import DPAR
from models.entropy_head import EntropyHead, entropies_of
from models.gpt import token_entropy
from models.packed_patches import pack_patches
from models.patching import PatchRule, opens_patch, patch_starts
from models.sampling import sample_dpar
from models.token_sampling import SamplingOptions

GRID, TOKENS, CODES, CLASSES, IMAGES = 4, 16, 40, 5, 8
GUIDED = SamplingOptions(cfg_scale=2.5)
KINDS: tuple[HeadKind, ...] = ("linear", "mlp", "block")


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def head(rough: Callable[[Any], Any]) -> Callable[[DPAR, HeadKind], EntropyHead]:
    return lambda model, kind: rough(EntropyHead(EntropyHeadConfig.of(model.config, kind)))


def batch() -> tuple[Tensor, Tensor]:
    """Labels and uniform numbers."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CLASSES, (IMAGES,), generator=generator), torch.rand(IMAGES, TOKENS, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_decides_while_drawing_what_it_says_of_the_finished_image(
    kind: HeadKind, dpar: Callable[..., DPAR], head: Callable[[DPAR, HeadKind], EntropyHead]
) -> None:
    model = dpar()
    found = head(model, kind)
    labels, uniforms = batch()
    whole = entropies_of(model, found, (uniforms * CODES).long())
    rule = PatchRule(float(whole[:, 1:].median()), 3, True, GRID)
    tokens, starts = sample_dpar(model, labels, uniforms, GUIDED, HeadBoundaries(found, rule))
    entropies = entropies_of(model, found, tokens)
    assert ((entropies[:, 1:] - rule.threshold).abs() > 1e-6).all(), "one on the threshold could fall either way"
    assert torch.equal(starts, patch_starts(rule, entropies))
    assert len(set(starts.sum(1).tolist())) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codebook_size", [2, 16384])
def test_a_fresh_head_gives_half_the_largest_entropy_for_every_token(kind: HeadKind, codebook_size: int) -> None:
    # ln 2 / 2 and ln 16384 / 2 = 7 ln 2, in nats.
    expected = {2: 0.34657359, 16384: 4.85203026}[codebook_size]
    shape = {"dim": 64, "num_heads": 4, "width": 64, "codebook_size": codebook_size, "num_tokens": TOKENS}
    fresh = EntropyHead(EntropyHeadConfig(kind=kind, **shape)).bfloat16()
    found = fresh(torch.randn(2, 5, 64).bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((2, 5), expected), atol=2e-2, rtol=0)  # the weight is rounded
    assert found.unique().numel() == 1


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode(mode=False)
def test_a_head_learns_entropies_that_its_states_hold(kind: HeadKind) -> None:
    torch.manual_seed(0)
    states = torch.randn(16, TOKENS, 64)
    wanted = 1.5 + states[..., 0].tanh()
    shape = {"dim": 64, "num_heads": 4, "width": 64, "codebook_size": CODES, "num_tokens": TOKENS}
    learning = EntropyHead(EntropyHeadConfig(kind=kind, **shape))
    optimizer = torch.optim.AdamW(learning.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (learning(states) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * wanted.var().item() < losses[0]


class Recorded:
    """Boundaries that pass on another source's answers and keep the entropies of open patches."""

    reads_logits = True

    def __init__(self, source: Boundaries) -> None:
        self.source, self.entropies = source, torch.full((IMAGES, TOKENS), torch.nan)

    @property
    def longest(self) -> int:
        return self.source.longest

    def begin(self, slots: int, num_images: int, num_tokens: int) -> None:
        self.source.begin(slots, num_images, num_tokens)

    def opens(self, tokens: NextTokens) -> Tensor:
        assert tokens.logits is not None
        first = tokens.open_lengths > 0  # an image comes back with an empty patch
        self.entropies[tokens.images[first], tokens.positions[first]] = token_entropy(tokens.logits[first])
        return self.source.opens(tokens)

    def prefill(self, prefix: PrefixTokens) -> Tensor:
        return self.source.prefill(prefix)


def own_entropy(model: DPAR, tokens: Tensor, labels: Tensor, starts: Tensor, position: int) -> Tensor:
    """By a whole forward: of the token at `position`, had it not opened a patch."""
    open_on = starts.clone()
    open_on[:, position:] = False
    return token_entropy(model(tokens, labels, pack_patches(open_on))[:, position])


def test_own_entropies_are_those_of_a_forward_in_which_the_patch_goes_on(dpar: Callable[..., DPAR]) -> None:
    model, (labels, uniforms) = dpar(), batch()
    rule = PatchRule(3.3, 3, True, GRID)
    recorded = Recorded(OwnEntropyBoundaries(rule))
    tokens, starts = sample_dpar(model, labels, uniforms, GUIDED, recorded)
    for position in range(1, TOKENS):
        expected = own_entropy(model, tokens, labels, starts, position)
        torch.testing.assert_close(recorded.entropies[:, position], expected, atol=1e-5, rtol=1e-5)
    lengths = torch.ones(IMAGES, dtype=torch.int64)
    for position in range(1, TOKENS):
        opened = opens_patch(rule, torch.full((IMAGES,), position), recorded.entropies[:, position], lengths)
        assert torch.equal(opened, starts[:, position])
        lengths = torch.where(opened, 1, lengths + 1)
    assert 1 < float(starts.sum()) / IMAGES < TOKENS


@pytest.mark.slow
def test_a_step_that_was_taken_again_gives_the_logits_of_the_full_forward(dpar: Callable[..., DPAR]) -> None:
    model, (labels, uniforms) = dpar(), batch()
    tokens, starts = sample_dpar(model, labels, uniforms, GUIDED, OwnEntropyBoundaries(PatchRule(3.3, 3, True, GRID)))
    found = cached_logits(model, tokens, labels, Recorded(GivenBoundaries(starts)), SamplingOptions(), batch=2)
    expected = model(tokens, labels, pack_patches(starts))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [SamplingOptions(), GUIDED])
def test_a_step_is_taken_again_for_the_images_whose_patch_closed_and_for_no_others(
    options: SamplingOptions, dpar: Callable[..., DPAR]
) -> None:
    model, (labels, uniforms) = dpar(), batch()
    rows: list[int] = []
    model.output.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    source = OwnEntropyBoundaries(PatchRule(3.3, 3, True, GRID))
    _, starts = sample_dpar(model, labels, uniforms, options, source)
    assert len(set(starts.sum(1).tolist())) > 1
    closed = int(starts[:, 1:].sum())
    assert sum(rows) == (2 if options.guided else 1) * (IMAGES * TOKENS + closed)


def test_a_head_of_other_images_is_refused(dpar: Callable[..., DPAR]) -> None:
    model, (labels, uniforms) = dpar(), batch()
    other = EntropyHeadConfig(kind="linear", dim=64, num_heads=4, width=64, codebook_size=CODES, num_tokens=9)
    with pytest.raises(ValueError, match="entropy head is for 9 tokens an image, the sampled model for 16"):
        sample_dpar(model, labels, uniforms, GUIDED, HeadBoundaries(EntropyHead(other), PatchRule(1.0, 4, True, GRID)))
