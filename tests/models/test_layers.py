"""Norm, rotary positions, feed-forward width and class embedding, each against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from models.attention import causal_attention
from models.config import DPARConfig, GPTConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.layers import (
    Attention,
    FeedForward,
    LabelEmbedder,
    RMSNorm,
    apply_rope,
    dynamic_rope,
    grid_rope,
    index_rope,
)
from models.npp import next_patch_loss
from models.packed_patches import pack_patches

CPU = torch.device("cpu")


def test_rmsnorm_is_its_formula_and_keeps_the_type() -> None:
    x = torch.randn(4, 8)
    norm = RMSNorm(8)
    norm.weight.data.uniform_()
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert RMSNorm(8).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_rmsnorm_of_bfloat16_is_that_of_float32_rounded_once(weight_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (5 * torch.randn(64, 96)).bfloat16()
    norm = RMSNorm(96)
    norm.weight.data.uniform_(0.5, 1.5)
    norm = norm.to(weight_dtype)
    exact = RMSNorm(96)
    exact.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), exact(x.float()).bfloat16())


def test_rmsnorm_under_autocast_has_the_dtype_of_products_and_rounds_once() -> None:
    torch.manual_seed(0)
    x, norm = torch.randn(4, 8, requires_grad=True), RMSNorm(8)
    exact = norm(x)
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert torch.equal(found, exact.bfloat16())
    found.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("dim", "hidden"),
    [(512, 1536), (768, 2048), (1024, 2816), (1280, 3584), (1536, 4096), (2048, 5632), (3200, 8704), (4096, 11008)],
)
def test_feed_forward_widths_are_llamagens(dim: int, hidden: int) -> None:
    with torch.device("meta"):
        assert FeedForward(dim, 0.0).w1.weight.shape == (hidden, dim)


def test_grid_rope_turns_adjacent_pairs_by_row_then_column_and_zeroes_the_class() -> None:
    table = grid_rope(4, 16, CPU, class_row=True)
    assert table.shape == (17, 8, 2)
    assert not table[0].any()
    x = torch.randn(1, 16)
    row, column = 2, 3
    rotated = apply_rope(x, table[1 + row * 4 + column])
    for pair in range(8):
        frequency = 10000 ** (-2 * (pair % 4) / 8)
        angle = (row if pair < 4 else column) * frequency
        a, b = x[0, 2 * pair].item(), x[0, 2 * pair + 1].item()
        assert rotated[0, 2 * pair].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
        assert rotated[0, 2 * pair + 1].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-5)
    assert not apply_rope(x, table[0]).any()


def test_the_class_position_asks_and_answers_nothing_but_its_value_is_read() -> None:
    torch.manual_seed(0)
    layer, x = Attention(16, 2, dropout=0.0), torch.randn(1, 5, 16)
    table = grid_rope(2, 8, CPU, class_row=True)
    caught: list[torch.Tensor] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        caught[:] = [q, k, v]
        return causal_attention(q, k, v)

    before = layer(x, table, attend)
    q, k, v = caught
    assert not q[:, 0].any()
    assert not k[:, 0].any()
    assert v[:, 0].all()
    assert q[:, 1:].all()
    changed = x.clone()
    changed[:, 0] += 1
    assert ((layer(changed, table, attend) - before).abs().amax(dim=-1) > 1e-3).all()


def test_rotation_keeps_lengths() -> None:
    x = torch.randn(5, 2, 32)
    first, last = torch.tensor([0, 5, 9, 17, 30]), torch.tensor([1, 7, 9, 20, 31])
    for rope in (
        dynamic_rope(first, last, 8, 32, redundant=True),
        dynamic_rope(first, last, 8, 32, redundant=False),
        index_rope(first, 32),
    ):
        torch.testing.assert_close(apply_rope(x, rope).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_that_is_compiled_equals_the_complex_product(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    rope, weights = grid_rope(3, 16, CPU, class_row=True), torch.randn(2, 10, 4, 16)
    x = torch.randn(2, 10, 4, 16, dtype=dtype)
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        leaf = x.clone().requires_grad_()
        rotated = apply_rope(leaf, rope)
        (rotated.float() * weights).sum().backward()
        found.append((rotated.detach(), leaf.grad))
    (complex_values, complex_grads), (real_values, real_grads) = found
    torch.testing.assert_close(real_values, complex_values)
    torch.testing.assert_close(real_grads, complex_grads)
    one, expected = apply_rope(x[0, 3], rope[3]), complex_values[0, 3]
    torch.testing.assert_close(one, expected)


def test_dynamic_rope_holds_row_start_end_end_start() -> None:
    rope = dynamic_rope(torch.tensor([19]), torch.tensor([21]), 8, 64, redundant=True)[0]
    angles = torch.atan2(rope[:, 1], rope[:, 0])
    row, start, end = 2, 3, 5
    a = [10000 ** (-2 * i / 8) for i in range(4)]
    w = [10000 ** (-2 * i / 32) for i in range(16)]
    expected = [row * f for f in w] + [p * f for p in (start, end, end, start) for f in a]
    turned = torch.tensor(expected)
    torch.testing.assert_close(angles, torch.atan2(turned.sin(), turned.cos()), atol=1e-5, rtol=1e-5)
    assert w[1] == pytest.approx(0.5623, abs=1e-4)
    assert a[1] == pytest.approx(0.1)


def test_a_patch_of_one_token_has_equal_ends() -> None:
    one = dynamic_rope(torch.tensor([19]), torch.tensor([19]), 8, 64, redundant=True)[0]
    torch.testing.assert_close(one[16:20], one[20:24])


def test_dynamic_rope_refuses_a_head_it_cannot_share_out() -> None:
    with pytest.raises(ValueError, match="head width is 40, expected a multiple of 16"):
        dynamic_rope(torch.tensor([0]), torch.tensor([0]), 8, 40, redundant=True)


def test_labels_are_dropped_in_training_only_and_at_their_rate() -> None:
    torch.manual_seed(0)
    embedder = LabelEmbedder(10, 4, dropout_prob=0.25)
    labels = torch.full((4000,), 3)
    null = embedder.embedding_table.weight[10]
    dropped = (embedder(labels) == null).all(dim=1).float().mean().item()
    assert 0.22 < dropped < 0.28
    assert not (embedder.eval()(labels) == null).all(dim=1).any()


def test_a_table_made_while_sampling_still_serves_training() -> None:
    with torch.inference_mode():
        table = grid_rope(3, 8, CPU, class_row=False)
    x = torch.randn(9, 1, 8, requires_grad=True)
    apply_rope(x, table).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("token", [-1, 50])
def test_a_token_outside_the_codebook_is_refused_by_every_model(token: int) -> None:
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    tokens[1, 15] = token
    labels = torch.zeros(2, dtype=torch.int64)
    shape = {"dim": 32, "num_heads": 2, "codebook_size": 50, "num_tokens": 16, "num_classes": 3}
    gpt = GPT(GPTConfig(**shape, num_layers=1))
    dpar = DPAR(DPARConfig(**shape, encoder_layers=1, global_layers=1, decoder_layers=1))
    patches = pack_patches(torch.ones(2, 16, dtype=torch.bool))
    for use in (
        lambda: gpt.loss(tokens, labels),
        lambda: next_patch_loss(gpt, tokens, labels, 2),
        lambda: dpar.loss(tokens, labels, patches),
    ):
        with pytest.raises(ValueError, match=f"tokens from .*{token}.*, expected 0 to 49, the codebook"):
            use()
