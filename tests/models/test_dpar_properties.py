"""DPAR at the patchings and grids that its settings allow: extremes of the threshold, static patches, single tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import DPARConfig
from models.dpar import DPAR
from models.packed_patches import pack_patches
from models.patching import PatchRule, patch_starts, static_patch_starts

CODES, CLASSES = 40, 5
INFINITE = math.inf


def model_of(grid: int, **changes: Any) -> DPAR:
    torch.manual_seed(0)
    size = {"dim": 32, "num_heads": 2, "encoder_layers": 1, "global_layers": 1, "decoder_layers": 1}
    shape = {"codebook_size": CODES, "num_tokens": grid * grid, "num_classes": CLASSES}
    return DPAR(DPARConfig(**size | shape | changes))


def batch(grid: int, images: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(CODES, (images, grid * grid), generator=generator)
    return tokens, torch.randint(CLASSES, (images,), generator=generator)


def starts_of(grid: int, threshold: float, max_length: int = 4, images: int = 2) -> Tensor:
    entropies = torch.rand(images, grid * grid, generator=torch.Generator().manual_seed(2))
    return patch_starts(PatchRule(threshold, max_length, True, grid), entropies)


def trained(model: DPAR, tokens: Tensor, labels: Tensor, starts: Tensor, steps: int = 12) -> tuple[float, float]:
    """Loss before and after a few steps on one batch."""
    patches, losses = pack_patches(starts), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    model.eval()  # without dropout the loss can only fall by learning
    for _ in range(steps):
        loss = model.loss(tokens, labels, patches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("grid", [8, 16, 24, 32])
@pytest.mark.parametrize("threshold", [-INFINITE, 0.5, INFINITE])
def test_every_grid_trains_at_every_threshold(grid: int, threshold: float) -> None:
    model, (tokens, labels), starts = model_of(grid), batch(grid), starts_of(grid, threshold)
    counts = starts.sum(dim=1).tolist()
    fewest = grid * grid // 4 + 1  # the first token is alone
    if threshold == 0.5:
        assert all(fewest < count < grid * grid for count in counts)
    else:
        assert set(counts) == {grid * grid if threshold < 0 else fewest}
    loss = model.loss(tokens, labels, pack_patches(starts))
    assert loss.item() == pytest.approx(math.log(CODES), abs=1e-5)
    loss.backward()
    assert model.output.weight.grad is not None
    assert model.output.weight.grad.any()


@pytest.mark.parametrize(("grid", "fewest"), [(16, 65), (24, 145)])
def test_the_global_stack_has_a_row_for_each_patch_and_one_for_the_class(grid: int, fewest: int) -> None:
    rows = pack_patches(starts_of(grid, INFINITE)).global_lengths
    assert rows == [fewest + 1] * 2
    # The encoder does not read the last token, so that a patch of it alone has no row.
    assert pack_patches(starts_of(grid, -INFINITE)).global_lengths == [grid * grid] * 2


@pytest.mark.parametrize(("length", "patches"), [(1.8191, 141), (2.0, 128), (4.0, 64)])
def test_dpar_trains_on_static_patches(length: float, patches: int) -> None:
    starts = static_patch_starts(length, 256).expand(2, -1)
    assert starts.sum(dim=1).tolist() == [patches] * 2
    lengths = torch.diff(starts[0].nonzero()[:, 0], append=torch.tensor([256]))
    assert set(lengths[:-1].tolist()) == {math.floor(length), math.ceil(length)}
    tokens, labels = batch(16)
    before, after = trained(model_of(16), tokens % 5, labels, starts)
    assert before == pytest.approx(math.log(CODES), abs=1e-5)
    assert after < before - 1


def test_patches_of_at_most_one_token_let_each_position_read_its_own_global_output() -> None:
    grid = 4
    model, (tokens, labels) = model_of(grid).eval(), batch(grid)
    torch.nn.init.normal_(model.output.weight, std=0.5)
    patches = pack_patches(starts_of(grid, INFINITE, max_length=1))
    caught: list[Tensor] = []
    projection = model.local_decoder.cross_attn_layers[0]
    projection.register_forward_hook(lambda _module, inputs, _output: caught.append(inputs[0]))
    rows: list[Tensor] = []
    model.local_decoder.layers[0].register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0]))
    logits = model(tokens, labels, patches)
    context = projection(caught[0])
    states = rows[0] - context.unflatten(0, tokens.shape)  # what is left when Gout_j is taken off position j
    assert torch.allclose(states[:, 0], model.decoder_start_embedding.weight[0], atol=1e-6)
    for j in range(grid * grid):
        (reach,) = torch.autograd.grad(logits[0, j].sum(), caught[0], retain_graph=True)
        touched = reach.abs().sum(dim=1).nonzero()[:, 0].tolist()
        assert touched == list(range(j + 1))  # its own, and those of the positions that it attends to


def test_the_class_position_and_no_other_is_turned_to_nothing() -> None:
    model, (tokens, labels), starts = model_of(8), batch(8), starts_of(8, 0.5)
    patches, caught = pack_patches(starts), []
    model.layers[0].register_forward_hook(lambda _module, inputs, _output: caught.append(inputs[1]))
    model(tokens, labels, patches)
    lengths = caught[0].norm(dim=-1)  # (G, R): of each rotation
    expected = torch.ones_like(lengths)
    expected[[0, patches.global_lengths[0]]] = 0.0
    torch.testing.assert_close(lengths, expected)


def test_a_head_that_dynamic_positions_cannot_share_out_is_refused_when_the_model_is_built() -> None:
    narrow = {"dim": 48, "num_heads": 2}
    for kind in ("dynamic", "dynamic_no_redundancy"):
        with pytest.raises(ValueError, match=rf"position_embedding is {kind} and the head width 24 .*multiple of 16"):
            model_of(4, **narrow, position_embedding=kind)
    assert model_of(4, **narrow, position_embedding="patch_index_1d").head_dim == 24


@pytest.mark.parametrize(
    ("starts", "words"),
    [((2, 1), r"starts are \(2, 1\), expected \(images, T\) with two"), ((16,), r"starts are \(16,\)")],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_starts_that_are_no_batch_of_images_are_refused(starts: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack_patches(torch.ones(starts, dtype=torch.bool))


@pytest.mark.parametrize("num_tokens", [15, 0])
def test_images_that_are_no_square_grid_are_refused_when_the_model_is_built(num_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"num_tokens is {num_tokens}, expected a square number"):
        model_of(4, num_tokens=num_tokens)
