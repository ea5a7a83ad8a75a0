"""Sources of boundaries, teacher-forced: each opens patches where the rule does on entropies found without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.boundaries import EntropyHeadBoundaries, NextToken, OwnEntropyBoundaries
from models.config import DPARConfig
from models.dpar import DPAR, pack_patches
from models.gpt import token_entropy
from models.patching import PatchRule, patch_starts
from models.sampling import DPARDecoding, SamplingOptions, sample_dpar

GRID, TOKENS, CODES, CLASSES, IMAGES = 4, 16, 40, 5, 8
PLAIN, GUIDED = SamplingOptions(), SamplingOptions(cfg_scale=2.5)


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model() -> DPAR:
    """With weights far from their initial values."""
    size = {"dim": 64, "num_heads": 4, "encoder_layers": 2, "global_layers": 2, "decoder_layers": 2}
    shape = {"codebook_size": CODES, "num_tokens": TOKENS, "num_classes": CLASSES}
    made = DPAR(DPARConfig(**size, **shape, entropy_head="mlp"))
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return made.eval()


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and labels."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(CODES, (IMAGES, TOKENS), generator=generator)
    return tokens, torch.randint(CLASSES, (IMAGES,), generator=generator)


def rule(entropies: Tensor, **changes: Any) -> PatchRule:
    """At their median, halfway to the next one, so that rounding moves none across."""
    ordered = entropies[:, 2:].flatten().sort().values
    middle = len(ordered) // 2
    assert ordered[middle + 1] - ordered[middle] > 1e-5
    threshold = float(ordered[middle : middle + 2].mean())
    return PatchRule(**{"threshold": threshold, "max_length": 3, "row_boundary": True, "grid": GRID} | changes)


def own_entropies(model: DPAR, tokens: Tensor, labels: Tensor, starts: Tensor) -> Tensor:
    """Entropy of each token as the model predicts it if no patch opened there: a whole forward a position."""
    entropies = torch.zeros(tokens.shape)
    for position in range(1, TOKENS):
        going_on = starts.clone()
        going_on[:, position] = False
        entropies[:, position] = token_entropy(model(tokens, labels, pack_patches(going_on))[:, position])
    return entropies


def own_starts(model: DPAR, tokens: Tensor, labels: Tensor, rule: PatchRule) -> Tensor:
    """Where the model's own entropies open patches, one position after the other: each depends on those before."""
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    starts[:, 0] = True
    for position in range(1, TOKENS):
        found = own_entropies(model, tokens, labels, starts)
        assert ((found[:, position] - rule.threshold).abs() > 1e-5).all(), "it could fall to either side"
        starts[:, position] = patch_starts(rule, found)[:, position]
    return starts


@pytest.mark.parametrize("options", [PLAIN, GUIDED])
def test_the_heads_boundaries_are_those_of_its_entropies_of_the_whole_image(
    model: DPAR, options: SamplingOptions
) -> None:
    tokens, labels = batch()
    assert model.entropy_head is not None
    entropies = torch.cat([torch.zeros(IMAGES, 1), model.entropy_head(model.encoder_states(tokens))], dim=1)
    wanted = patch_starts(rule(entropies), entropies)
    assert len(set(wanted.sum(1).tolist())) > 2
    source = EntropyHeadBoundaries(model.entropy_head, rule(entropies))
    _, starts = sample_dpar(model, labels, torch.rand(IMAGES, TOKENS), options, source, prefix=tokens)
    assert torch.equal(starts, wanted)


@pytest.mark.parametrize("options", [PLAIN, GUIDED])
@pytest.mark.parametrize("row_boundary", [True, False])
def test_own_entropies_open_patches_and_the_token_is_predicted_again_from_the_new_one(
    model: DPAR, options: SamplingOptions, row_boundary: bool
) -> None:
    tokens, labels = batch()
    every_other = (torch.arange(TOKENS) % 2 == 0).expand(IMAGES, -1)
    cut = rule(own_entropies(model, tokens, labels, every_other), row_boundary=row_boundary)
    wanted = own_starts(model, tokens, labels, cut)
    free = wanted[:, 2:] if not row_boundary else wanted.unflatten(1, (GRID, GRID))[:, 1:, 1:]
    assert 0.2 < free.float().mean() < 0.8, "the entropies must decide"
    decoding = DPARDecoding(model, labels, options, OwnEntropyBoundaries(cut))
    cached = [decoding.step(tokens[:, t - 1] if t else None) for t in range(TOKENS)]
    assert torch.equal(decoding.starts, wanted)
    patches = pack_patches(wanted)
    conditional, unconditional = (model(tokens, y, patches) for y in (labels, torch.full_like(labels, CLASSES)))
    expected = unconditional + options.cfg_scale * (conditional - unconditional)
    torch.testing.assert_close(torch.stack(cached, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_no_prediction_is_made_where_the_rule_alone_opens_every_patch() -> None:
    def token(position: int, *open_lengths: int) -> NextToken:
        lengths = torch.tensor(open_lengths)
        state = torch.zeros(len(lengths), 1)

        def predict() -> Tensor:
            asked.append(position)
            return torch.zeros(len(lengths), CODES)

        return NextToken(
            position=position, previous=lengths, state=state, open_lengths=lengths, logits_if_it_goes_on=predict
        )

    asked: list[int] = []
    source = OwnEntropyBoundaries(PatchRule(100.0, 3, True, GRID))
    found = [source.opens(given).tolist() for given in (token(1, 1, 1), token(4, 1, 3), token(6, 3, 3), token(6, 3, 2))]
    assert found == [[True, True], [True, True], [True, True], [True, False]]
    assert asked == [6]
