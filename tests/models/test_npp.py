"""Next Patch Prediction: a plain reference, LlamaGen as its case of single tokens, causality, cost, schedule."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.cached_gpt import gpt_logits
from models.config import GPTConfig, NextPatchSchedule
from models.gpt import GPT
from models.kv_cache import KVCache
from models.npp import next_patch_loss, tokens_by_block

GRID, TOKENS, CODES, CLASSES = 8, 64, 50, 5


def small(codebook_size: int = CODES, num_tokens: int = TOKENS, dropout: float = 0.1) -> GPT:
    torch.manual_seed(0)
    shape = {"dim": 32, "num_layers": 2, "num_heads": 2, "num_classes": CLASSES}
    return GPT(GPTConfig(**shape, codebook_size=codebook_size, num_tokens=num_tokens, dropout=dropout))


def opinionated() -> GPT:
    """Weights far from their initial values."""
    model = small().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model


def batch(images: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(CODES, (images, TOKENS), generator=generator)
    return tokens, torch.randint(CLASSES, (images,), generator=generator)


def block_places(side: int) -> list[list[int]]:
    """Positions of the tokens of each block, blocks in raster order."""
    starts = [(row, column) for row in range(0, GRID, side) for column in range(0, GRID, side)]
    return [[(r + i) * GRID + c + j for i in range(side) for j in range(side)] for r, c in starts]


def reference(model: GPT, tokens: Tensor, label: int, side: int) -> Tensor:
    """Loss of one image: block after block through the cached steps of a LlamaGen made for a grid of blocks."""
    places = block_places(side)
    coarse = GPT(replace(model.config, num_tokens=len(places))).eval()
    coarse.load_state_dict(model.state_dict())
    embedded = [sum(model.tok_embeddings(tokens[p]) for p in block) / side**2 for block in places]
    inputs = [model.cls_embedding(torch.tensor([label]))[0], *embedded[:-1]]
    cache, losses, slot = KVCache(len(coarse.layers), 1, len(places)), [], torch.tensor([0])
    for position, (hidden, block) in enumerate(zip(inputs, places, strict=True)):
        log_probs = gpt_logits(coarse, hidden[None], slot, torch.tensor([position]), cache)[0].log_softmax(-1)
        losses += [-log_probs[tokens[p]] for p in block]
    return torch.stack(losses).mean()


def logits_of(model: GPT, tokens: Tensor, labels: Tensor, side: int) -> Tensor:
    """What the head makes of the features that the loss reads."""
    caught: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    next_patch_loss(model, tokens, labels, side)
    handle.remove()
    return model.output(caught[0])


@pytest.mark.slow
@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_the_loss_equals_the_reference_one_block_at_a_time(side: int) -> None:
    model, (tokens, labels) = opinionated(), batch()
    with torch.no_grad():
        expected = torch.stack([reference(model, t, int(y), side) for t, y in zip(tokens, labels, strict=True)]).mean()
        torch.testing.assert_close(next_patch_loss(model, tokens, labels, side), expected, atol=1e-5, rtol=1e-5)
    assert expected > math.log(CODES) + 0.5, "a loss of even logits would agree whatever the model does"


def test_it_is_the_cross_entropy_with_a_uniform_label_over_the_block() -> None:
    model, (tokens, labels) = opinionated(), batch()
    blocks = tokens_by_block(tokens, 2)
    soft = F.one_hot(blocks, CODES).float().mean(dim=2)
    expected = F.cross_entropy(logits_of(model, tokens, labels, 2).flatten(0, 1), soft.flatten(0, 1))
    torch.testing.assert_close(next_patch_loss(model, tokens, labels, 2), expected)


def test_blocks_of_one_token_are_llamagen_with_its_gradients_and_random_numbers() -> None:
    tokens, labels = batch()
    model = opinionated().train()
    twin = copy.deepcopy(model)
    losses = []
    for one, loss in (
        (model, lambda: next_patch_loss(model, tokens, labels, 1)),
        (twin, lambda: twin.loss(tokens, labels)),
    ):
        torch.manual_seed(3)  # of dropout and of dropped classes
        losses.append(loss())
        losses[-1].backward()
        assert one.training
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)
    for expected, found in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_the_first_loss_is_the_logarithm_of_the_codebook(side: int) -> None:
    model = small(codebook_size=16384)
    assert next_patch_loss(model, *batch(), side).item() == pytest.approx(9.70406, abs=1e-4)


def test_no_block_sees_what_it_predicts_and_the_last_is_seen_by_none() -> None:
    model, (tokens, labels), side = opinionated(), batch(1), 2
    before = logits_of(model, tokens, labels, side)
    for number, places in enumerate(block_places(side)):
        changed = tokens.clone()
        changed[0, places[-1]] = (changed[0, places[-1]] + 1) % CODES
        after = logits_of(model, changed, labels, side)
        assert torch.equal(after[:, : number + 1], before[:, : number + 1])
        if number + 1 < len(before[0]):
            assert not torch.equal(after[:, number + 1], before[:, number + 1])


def test_the_order_of_tokens_in_a_block_does_not_matter_and_that_of_blocks_does() -> None:
    model, (tokens, labels) = opinionated(), batch()
    grid = tokens.unflatten(1, (GRID, GRID))
    rows_swapped = grid[:, [1, 0, *range(2, GRID)]].flatten(1)
    blocks_swapped = grid[:, [2, 3, 0, 1, *range(4, GRID)]].flatten(1)
    loss = next_patch_loss(model, tokens, labels, 2)
    torch.testing.assert_close(next_patch_loss(model, rows_swapped, labels, 2), loss, atol=1e-5, rtol=1e-6)
    assert abs(next_patch_loss(model, blocks_swapped, labels, 2) - loss) > 1e-3


@pytest.mark.parametrize(("levels", "share"), [(1, 1.0), (2, 0.625), (3, 0.578125)])
def test_a_schedule_costs_its_published_share_of_llamagens_rows(levels: int, share: float) -> None:
    model, schedule, steps, rows = small(), NextPatchSchedule(levels=levels), 8, [0]

    def count(_module: object, inputs: tuple[Tensor, ...], _output: object) -> None:
        rows[0] += inputs[0].shape[1]

    model.layers[0].register_forward_hook(count)
    for step in range(steps):
        next_patch_loss(model, *batch(1), schedule.side(step, steps))
    assert rows[0] == share * steps * TOKENS


@pytest.mark.parametrize(
    ("levels", "ends"), [(1, (300,)), (2, (150, 300)), (3, (75, 150, 300)), (4, (37, 75, 150, 300))]
)
def test_levels_end_where_they_are_published_to(levels: int, ends: tuple[int, ...]) -> None:
    schedule = NextPatchSchedule(levels=levels)
    assert schedule.ends(300) == ends
    assert [side**2 for side in schedule.sides] == [64, 16, 4, 1][-levels:]
    for first, end, side in zip((0, *ends), ends, schedule.sides, strict=False):
        assert {schedule.side(step, 300) for step in (first, end - 1)} == {side}


@pytest.mark.parametrize(
    ("levels", "epochs"), [(1, (300,)), (2, (150, 300)), (3, (75, 150, 300)), (4, (37, 75, 150, 300))]
)
def test_levels_in_steps_end_with_whole_epochs(levels: int, epochs: tuple[int, ...]) -> None:
    schedule = NextPatchSchedule(levels=levels, epoch_steps=5004)
    assert schedule.ends(300 * 5004) == tuple(5004 * epoch for epoch in epochs)
    assert schedule.ends(300 * 5004 + 7)[-1] == 300 * 5004 + 7, "the last level ends the training"


@pytest.mark.parametrize(("side", "width"), [(3, TOKENS), (16, TOKENS), (2, 16)])
def test_blocks_that_do_not_fit_the_grid_are_refused(side: int, width: int) -> None:
    with pytest.raises(ValueError, match=rf"{width} tokens an image and blocks of {side} x {side}, expected 64 tokens"):
        next_patch_loss(small(), torch.zeros(1, width, dtype=torch.int64), torch.tensor([0]), side)
