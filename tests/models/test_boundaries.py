"""Sources of boundaries: each decides while drawing what its entropies and the rule say of the finished image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.boundaries import Boundaries, GivenBoundaries, HeadBoundaries, OwnEntropyBoundaries
from models.config import DPARConfig, EntropyHeadConfig, HeadKind
from models.dpar import DPAR
from models.entropy_head import EntropyHead, entropies_of
from models.gpt import token_entropy
from models.packed_patches import pack_patches
from models.patching import PatchRule, opens_patch, patch_starts
from models.sampling import DPARDecoding, sample_dpar
from models.token_sampling import SamplingOptions

GRID, TOKENS, CODES, CLASSES, IMAGES = 4, 16, 40, 5, 8
GUIDED = SamplingOptions(cfg_scale=2.5)
KINDS: tuple[HeadKind, ...] = ("linear", "mlp", "block")


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.inference_mode():
        yield


def rough(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model.eval()


def dpar() -> DPAR:
    size = {"dim": 64, "num_heads": 4, "encoder_layers": 2, "global_layers": 2, "decoder_layers": 2}
    return rough(DPAR(DPARConfig(**size, codebook_size=CODES, num_tokens=TOKENS, num_classes=CLASSES)))


def head(model: DPAR, kind: HeadKind) -> EntropyHead:
    return rough(EntropyHead(EntropyHeadConfig.of(model.config, kind)))


def batch() -> tuple[Tensor, Tensor]:
    """Labels and uniform numbers."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CLASSES, (IMAGES,), generator=generator), torch.rand(IMAGES, TOKENS, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_decides_while_drawing_what_it_says_of_the_finished_image(kind: HeadKind) -> None:
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
def test_a_head_starts_with_one_answer_and_learns_others(kind: HeadKind) -> None:
    model = dpar()
    fresh = EntropyHead(EntropyHeadConfig.of(model.config, kind))
    assert fresh(torch.randn(2, 5, 64)).unique().numel() == 1
    assert fresh(torch.randn(2, 5, 64)).dtype == torch.float32


class Recorded:
    """Boundaries that pass on another source's answers and keep the entropies of open patches."""

    def __init__(self, source: Boundaries) -> None:
        self.source, self.entropies = source, [torch.zeros(IMAGES)]

    def begin(self, batch: int, num_tokens: int) -> None:
        self.source.begin(batch, num_tokens)

    def opens(self, token: Any) -> Tensor:
        self.entropies.append(token_entropy(token.open_logits()))
        return self.source.opens(token)


def own_entropy(model: DPAR, tokens: Tensor, labels: Tensor, starts: Tensor, position: int) -> Tensor:
    """By a whole forward: of the token at `position`, had it not opened a patch."""
    open_on = starts.clone()
    open_on[:, position:] = False
    return token_entropy(model(tokens, labels, pack_patches(open_on))[:, position])


def test_own_entropies_are_those_of_a_forward_in_which_the_patch_goes_on() -> None:
    model, (labels, uniforms) = dpar(), batch()
    rule = PatchRule(3.3, 3, True, GRID)
    recorded = Recorded(OwnEntropyBoundaries(rule))
    tokens, starts = sample_dpar(model, labels, uniforms, GUIDED, recorded)
    for position in range(1, TOKENS):
        expected = own_entropy(model, tokens, labels, starts, position)
        torch.testing.assert_close(recorded.entropies[position], expected, atol=1e-5, rtol=1e-5)
    lengths = torch.ones(IMAGES, dtype=torch.int64)
    for position in range(1, TOKENS):
        opened = opens_patch(rule, position, recorded.entropies[position], lengths)
        assert torch.equal(opened, starts[:, position])
        lengths = torch.where(opened, 1, lengths + 1)
    assert 1 < float(starts.sum()) / IMAGES < TOKENS


def test_a_step_that_was_taken_again_gives_the_logits_of_the_full_forward() -> None:
    model, (labels, uniforms) = dpar(), batch()
    tokens, starts = sample_dpar(model, labels, uniforms, GUIDED, OwnEntropyBoundaries(PatchRule(3.3, 3, True, GRID)))
    recorded = Recorded(GivenBoundaries(starts))
    decoding = DPARDecoding(model, labels, SamplingOptions(), recorded)
    cached = [decoding.step(tokens[:, t - 1] if t else None) for t in range(TOKENS)]
    expected = model(tokens, labels, pack_patches(starts))
    torch.testing.assert_close(torch.stack(cached, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [SamplingOptions(), GUIDED])
def test_a_step_is_taken_again_for_the_images_whose_patch_closed_and_for_no_others(options: SamplingOptions) -> None:
    model, (labels, uniforms) = dpar(), batch()
    rows: list[int] = []
    model.output.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    source = OwnEntropyBoundaries(PatchRule(3.3, 3, True, GRID))
    _, starts = sample_dpar(model, labels, uniforms, options, source)
    assert len(set(starts.sum(1).tolist())) > 1
    closed = int(starts[:, 1:].sum())
    assert sum(rows) == (2 if options.guided else 1) * (IMAGES * TOKENS + closed)


def test_a_head_of_other_images_is_refused() -> None:
    model, (labels, uniforms) = dpar(), batch()
    other = EntropyHeadConfig(kind="linear", dim=64, num_heads=4, width=64, codebook_size=CODES, num_tokens=9)
    with pytest.raises(ValueError, match="entropy head is for 9 tokens an image, the sampled model for 16"):
        sample_dpar(model, labels, uniforms, GUIDED, HeadBoundaries(EntropyHead(other), PatchRule(1.0, 4, True, GRID)))
