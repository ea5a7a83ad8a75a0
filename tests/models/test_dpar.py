"""DPAR: published sizes, a plain reference one image at a time, causality, and the layout of packed patches."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import DPAR_SIZES, DPARConfig, GPTConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.packed_patches import pack_patches
from models.patching import PatchRule, patch_starts

GRID, TOKENS, CODES, CLASSES = 4, 16, 40, 5


def small(**changes: Any) -> DPAR:
    """Two layers a stack, weights far from their initial values."""
    torch.manual_seed(0)
    size = {"dim": 64, "num_heads": 4, "encoder_layers": 2, "global_layers": 2, "decoder_layers": 2}
    shape = {"codebook_size": CODES, "num_tokens": TOKENS, "num_classes": CLASSES}
    model = DPAR(DPARConfig(**size | shape | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model.eval()


def batch(images: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and ragged starts, patches over row ends among them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(CODES, (images, TOKENS), generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    starts = patch_starts(PatchRule(0.6, 4, False, GRID), torch.rand(images, TOKENS, generator=generator))
    return tokens, labels, starts


# The reference: loops over positions, heads, patches; formulas as the paper states them.


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotate(x: Tensor, angles: list[list[float] | None]) -> Tensor:
    """(S, K) by S lists of K / 2 angles; None is the class position, which becomes zero."""
    rows = []
    for vector, row in zip(x, angles, strict=True):
        if row is None:
            rows.append(torch.zeros_like(vector))
            continue
        pairs = [
            torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) @ vector[2 * i : 2 * i + 2]
            for i, a in enumerate(row)
        ]
        rows.append(torch.cat(pairs))
    return torch.stack(rows)


def block(weights: dict[str, Tensor], name: str, x: Tensor, angles: list[list[float] | None], heads: int) -> Tensor:
    def linear(part: str, y: Tensor) -> Tensor:
        return y @ weights[f"{name}.{part}.weight"].T

    q, k, v = linear("attention.wqkv", rms_norm(x, weights[f"{name}.attention_norm.weight"])).chunk(3, dim=-1)
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    mixed = []
    for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = rotate(qh, angles) @ rotate(kh, angles).T / qh.shape[-1] ** 0.5
        mixed.append(scores.masked_fill(future, -math.inf).softmax(-1) @ vh)
    x = x + linear("attention.wo", torch.cat(mixed, -1))
    y = rms_norm(x, weights[f"{name}.ffn_norm.weight"])
    gate = linear("feed_forward.w1", y)
    return x + linear("feed_forward.w2", gate * gate.sigmoid() * linear("feed_forward.w3", y))


def pool(weights: dict[str, Tensor], name: str, patch: Tensor, members: Tensor, heads: int) -> Tensor:
    """One patch's cross-attention."""
    q = weights[f"{name}.wq.weight"] @ rms_norm(patch, weights[f"{name}.cross_attn_norm_q.weight"])
    normed = rms_norm(members, weights[f"{name}.cross_attn_norm_kv.weight"])
    k, v = (normed @ weights[f"{name}.{w}.weight"].T for w in ("wk", "wv"))
    mixed = [
        (kh @ qh / len(qh) ** 0.5).softmax(0) @ vh
        for qh, kh, vh in zip(q.chunk(heads), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)
    ]
    return patch + weights[f"{name}.wo.weight"] @ torch.cat(mixed)


def powers(count: int, width: float) -> list[float]:
    return [10000.0 ** (-2 * i / width) for i in range(count)]


def patch_angles(kind: str, first: int, last: int, number: int, width: int) -> list[float]:
    row, start, end = first // GRID, first % GRID, last % GRID
    by_row = [row * w for w in powers(width // 4, width / 2)]
    if kind == "dynamic":
        return by_row + [p * a for p in (start, end, end, start) for a in powers(width // 16, width / 8)]
    if kind == "dynamic_no_redundancy":
        return by_row + [p * a for p in (start, end) for a in powers(width // 8, width / 4)]
    return [number * w for w in powers(width // 2, width)]


def reference(model: DPAR, tokens: Tensor, label: int, starts: Tensor) -> Tensor:
    """Logits (T, V) of one image."""
    config, weights = model.config, dict(model.state_dict())
    heads, width = config.num_heads, config.dim // config.num_heads
    token_angles: list[list[float] | None] = [
        [p * w for p in (j // GRID, j % GRID) for w in powers(width // 4, width / 2)] for j in range(TOKENS)
    ]
    places = [*starts.nonzero()[:, 0].tolist(), TOKENS]
    spans = [(a, min(b, TOKENS - 1)) for a, b in pairwise(places) if a < TOKENS - 1]

    states = weights["tok_embeddings.weight"][tokens[:-1]]
    patches: list[Tensor] = []
    for i in range(config.encoder_layers):
        states = block(weights, f"local_encoder.layers.{i}", states, token_angles[:-1], heads)
        patches = patches or [states[a:b].amax(0) for a, b in spans]
        name = f"local_encoder.cross_attn_layers.{i}"
        patches = [pool(weights, name, p, states[a:b], heads) for p, (a, b) in zip(patches, spans, strict=True)]

    context = torch.stack([weights["cls_embedding.embedding_table.weight"][label], *patches])
    angles = [patch_angles(config.position_embedding, a, b - 1, n, width) for n, (a, b) in enumerate(spans)]
    for i in range(config.global_layers):
        context = block(weights, f"layers.{i}", context, [None, *angles], heads)

    hidden = torch.cat([weights["decoder_start_embedding.weight"], states])
    patch_of_target = starts.long().cumsum(0) - 1
    for i in range(config.decoder_layers):
        name = f"local_decoder.cross_attn_layers.{i}"
        normed = rms_norm(context, weights[f"{name}.cross_attn_norm_kv.weight"])
        hidden = hidden + (normed @ weights[f"{name}.wo.weight"].T)[patch_of_target]
        hidden = block(weights, f"local_decoder.layers.{i}", hidden, [None, *token_angles[:-1]], heads)
    return rms_norm(hidden, weights["norm.weight"]) @ weights["output.weight"].T


@pytest.mark.parametrize("position_embedding", ["dynamic", "dynamic_no_redundancy", "patch_index_1d"])
def test_the_packed_forward_equals_the_reference_one_image_at_a_time(position_embedding: str) -> None:
    model = small(position_embedding=position_embedding)
    tokens, labels, starts = batch(6)
    assert len(set(starts.sum(1).tolist())) > 2, "the batch must be ragged"
    with torch.no_grad():
        found = model(tokens, labels, pack_patches(starts))
        for row in range(len(tokens)):
            expected = reference(model, tokens[row], int(labels[row]), starts[row])
            torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)
    assert found.std() > 0.3, "logits this small would agree whatever the model does"


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "decayed", "decayed_parameters"),
    [
        ("B", 115_021_824, 101, 71, 114_998_784),
        ("L", 351_306_752, 187, 132, 351_250_432),
        ("XL", 789_455_360, 273, 193, 789_352_960),
        ("XXL", 1_434_579_456, 359, 254, 1_434_418_176),
    ],
)
def test_sizes_are_those_of_the_authors_models(
    name: str, parameters: int, tensors: int, decayed: int, decayed_parameters: int
) -> None:
    with torch.device("meta"):
        config = DPARConfig(**asdict(DPAR_SIZES[name]), codebook_size=16384, num_tokens=256, num_classes=1000)
        state = DPAR(config).state_dict()
    assert (sum(t.numel() for t in state.values()), len(state)) == (parameters, tensors)
    matrices = [t.numel() for t in state.values() if t.ndim >= 2]
    assert (len(matrices), sum(matrices)) == (decayed, decayed_parameters)


def test_weights_have_the_authors_names() -> None:
    names = set(small().state_dict())
    assert {
        "cls_embedding.embedding_table.weight",
        "tok_embeddings.weight",
        "local_encoder.layers.1.attention.wqkv.weight",
        "local_encoder.cross_attn_layers.0.cross_attn_norm_q.weight",
        "local_encoder.cross_attn_layers.0.cross_attn_norm_kv.weight",
        "local_encoder.cross_attn_layers.1.wq.weight",
        "layers.1.ffn_norm.weight",
        "decoder_start_embedding.weight",
        "local_decoder.layers.1.feed_forward.w2.weight",
        "local_decoder.cross_attn_layers.1.cross_attn_norm_kv.weight",
        "local_decoder.cross_attn_layers.1.wo.weight",
        "norm.weight",
        "output.weight",
    } <= names


def test_the_first_loss_is_the_logarithm_of_the_codebook() -> None:
    sizes = {"dim": 64, "num_heads": 4, "encoder_layers": 1, "global_layers": 1, "decoder_layers": 1}
    model = DPAR(DPARConfig(**sizes, codebook_size=16384, num_tokens=TOKENS, num_classes=CLASSES))
    tokens, labels, starts = batch(3)
    assert model.loss(tokens, labels, pack_patches(starts)).item() == pytest.approx(9.70406, abs=1e-4)


def test_with_patches_fixed_no_position_sees_what_it_predicts() -> None:
    model = small()
    tokens, labels, starts = batch(2)
    patches = pack_patches(starts)
    before = model(tokens, labels, patches)
    for j in range(TOKENS):
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 1) % CODES
        after = model(changed, labels, patches)
        torch.testing.assert_close(after[:, : j + 1], before[:, : j + 1], atol=1e-6, rtol=0)
        assert j == TOKENS - 1 or not torch.equal(after[:, j + 1], before[:, j + 1])


def test_with_patches_decided_anew_no_position_sees_what_it_predicts() -> None:
    model = small()
    size = {"dim": 32, "num_layers": 1, "num_heads": 2, "codebook_size": CODES, "num_tokens": TOKENS}
    entropy_model = GPT(GPTConfig(**size, num_classes=None)).eval()
    torch.nn.init.normal_(entropy_model.output.weight, std=1.0)
    tokens, labels, _ = batch(4)
    entropies = entropy_model.entropy(tokens).detach()
    rule = PatchRule(float(entropies[:, 1:].median()), 4, True, GRID)
    starts = patch_starts(rule, entropies)
    before, moved = model(tokens, labels, pack_patches(starts)), 0
    for j in range(TOKENS):
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 1) % CODES
        anew = patch_starts(rule, entropy_model.entropy(changed))
        moved += int((anew != starts).sum())
        after = model(changed, labels, pack_patches(anew))
        torch.testing.assert_close(after[:, : j + 1], before[:, : j + 1], atol=1e-6, rtol=0)
    assert moved > 0, "no boundary moved, so the test would not see a leak through boundaries"


def test_the_loss_is_the_mean_over_images_and_their_order_does_not_matter() -> None:
    model = small()
    tokens, labels, starts = batch(5)
    alone = [model.loss(*rows, pack_patches(s[None])).item() for *rows, s in zip(
        tokens.split(1), labels.split(1), starts, strict=True
    )]  # fmt: skip
    assert model.loss(tokens, labels, pack_patches(starts)).item() == pytest.approx(sum(alone) / 5, abs=1e-5)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = model(tokens[order], labels[order], pack_patches(starts[order]))
    torch.testing.assert_close(shuffled, model(tokens, labels, pack_patches(starts))[order], atol=1e-5, rtol=1e-5)


def test_every_weight_learns_under_autocast_too() -> None:
    model = small().train()
    tokens, labels, starts = batch(4)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, labels, pack_patches(starts))
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_autocast_stays_near_float32() -> None:
    model = small()
    tokens, labels, starts = batch(4)
    with torch.no_grad():
        exact = model.loss(tokens, labels, pack_patches(starts))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.loss(tokens, labels, pack_patches(starts))
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2)


def test_dropout_acts_in_the_global_stack_only() -> None:
    model = small(dropout=0.3)
    dropping = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0}
    per_layer = ("attention.resid_dropout", "feed_forward.ffn_dropout")
    assert dropping == {"tok_dropout", *(f"layers.{i}.{part}" for i in range(2) for part in per_layer)}


def test_packed_patches_lie_where_the_starts_say() -> None:
    starts = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    patches = pack_patches(starts)  # the encoder reads five tokens an image
    assert patches.global_lengths == [4, 6]
    assert patches.tokens.tolist() == [[0] * 3, [1, 2, 3], [4] * 3, [5] * 3, [6] * 3, [7] * 3, [8] * 3, [9] * 3]
    assert patches.valid.sum(1).tolist() == [1, 3, 1, 1, 1, 1, 1, 1]
    assert patches.first.tolist() == [0, 1, 4, 0, 1, 2, 3, 4]
    assert patches.last.tolist() == [0, 3, 4, 0, 1, 2, 3, 4]
    assert patches.number.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert patches.global_order.tolist() == [0, 2, 3, 4, 1, 5, 6, 7, 8, 9]
    assert patches.target_rows.tolist() == [[0, 1, 1, 1, 2, 2], [4, 5, 6, 7, 8, 9]]


def test_patches_of_one_token_give_each_position_its_own_row() -> None:
    patches = pack_patches(torch.ones(3, TOKENS, dtype=torch.bool))
    assert patches.global_lengths == [TOKENS] * 3
    assert patches.target_rows.flatten().tolist() == list(range(3 * TOKENS))


def test_an_image_that_opens_no_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="starts no patch"):
        pack_patches(torch.tensor([[True, True], [False, True]]))


def test_patches_of_other_images_are_refused() -> None:
    model = small()
    tokens, labels, starts = batch(3)
    with pytest.raises(ValueError, match=r"tokens are \(2, 16\) and patches are of \(3, 16\)"):
        model(tokens[:2], labels[:2], pack_patches(starts))
