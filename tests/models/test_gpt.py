"""LlamaGen and the entropy model: counts, names, first loss, causality, entropies."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models.gpt
from models.cached_gpt import gpt_logits
from models.config import GPT_SIZES, GPTConfig
from models.gpt import GPT, token_entropy
from models.kv_cache import KVCache


def meta(name: str, num_classes: int | None) -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig(**asdict(GPT_SIZES[name]), codebook_size=16384, num_tokens=256, num_classes=num_classes))


def small(num_classes: int | None = 5, **changes: float) -> GPT:
    torch.manual_seed(0)
    config = {"dim": 32, "num_layers": 2, "num_heads": 2, "codebook_size": 50, "num_tokens": 16} | changes
    model = GPT(GPTConfig(**config, num_classes=num_classes))
    torch.nn.init.normal_(model.output.weight, std=0.2)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "conditional", "unconditional"),
    [
        ("T", 37_743_616, 37_231_104),
        ("B", 110_888_448, 110_119_680),
        ("L", 342_910_976, 341_885_952),
        ("XL", 774_699_520, 773_418_240),
        ("XXL", 1_410_972_672, 1_409_435_136),
        ("1B", 1_199_616_000, None),
        ("3B", 3_096_659_200, None),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, conditional: int, unconditional: int | None) -> None:
    assert sum(p.numel() for p in meta(name, 1000).parameters()) == conditional
    if unconditional is not None:
        assert sum(p.numel() for p in meta(name, None).parameters()) == unconditional


def test_tensors_have_llamagens_names() -> None:
    state = meta("B", 1000).state_dict()
    assert len(state) == 88
    assert state["cls_embedding.embedding_table.weight"].shape == (1001, 768)
    assert state["layers.11.attention.wqkv.weight"].shape == (2304, 768)
    assert state["layers.0.feed_forward.w3.weight"].shape == (2048, 768)
    assert {"tok_embeddings.weight", "norm.weight", "output.weight", "layers.0.attention_norm.weight"} <= set(state)
    decayed = [tensor.numel() for tensor in state.values() if tensor.ndim >= 2]
    assert (len(decayed), sum(decayed)) == (63, 110_869_248)
    assert len(meta("B", None).state_dict()) == 87


@pytest.mark.parametrize("num_classes", [5, None])
def test_the_first_loss_is_the_logarithm_of_the_codebook(num_classes: int | None) -> None:
    size = {"dim": 32, "num_layers": 1, "num_heads": 2}
    model = GPT(GPTConfig(**size, codebook_size=16384, num_tokens=16, num_classes=num_classes))
    tokens = torch.randint(16384, (2, 16))
    labels = None if num_classes is None else torch.tensor([0, 4])
    assert model.loss(tokens, labels).item() == pytest.approx(9.70406, abs=1e-4)


def test_no_position_sees_what_it_predicts() -> None:
    model = small()
    tokens, labels = torch.randint(50, (1, 16)), torch.tensor([1])
    before = model(tokens, labels)
    assert before.shape == (1, 16, 50)
    for j in (0, 7, 15):
        changed = tokens.clone()
        changed[0, j] = (changed[0, j] + 1) % 50
        after = model(changed, labels)
        assert torch.equal(before[:, : j + 1], after[:, : j + 1])
        assert j == 15 or not torch.equal(before[:, j + 1 :], after[:, j + 1 :])


def test_the_class_matters_to_every_position() -> None:
    model, tokens = small(), torch.randint(50, (1, 16))
    difference = (model(tokens, torch.tensor([1])) - model(tokens, torch.tensor([2]))).abs().amax(dim=-1)
    assert (difference > 0).all()


def test_cached_steps_equal_the_whole_forward() -> None:
    for model in (small(), small(num_classes=None)):
        tokens, labels = torch.randint(50, (3, 16)), torch.tensor([0, 1, 2])
        inputs = model.tok_embeddings(tokens[:, :-1])
        if model.conditional:
            inputs = torch.cat([model.cls_embedding(labels)[:, None], inputs], dim=1)
        cache, slots = KVCache(len(model.layers), slots=5, capacity=16), torch.tensor([4, 0, 2])
        places = [torch.full((3,), t) for t in range(inputs.shape[1])]
        steps = [gpt_logits(model, inputs[:, t], slots, place, cache) for t, place in enumerate(places)]
        whole = model(tokens, labels if model.conditional else None)
        torch.testing.assert_close(torch.stack(steps, dim=1), whole, atol=1e-5, rtol=1e-4)


def test_entropies_are_of_the_next_token_and_the_first_is_the_uniform_one() -> None:
    model, tokens = small(num_classes=None), torch.randint(50, (2, 16))
    entropies = model.entropy(tokens)
    assert entropies.shape == (2, 16)
    assert entropies[:, 0].tolist() == pytest.approx([math.log(50)] * 2)
    probabilities = model(tokens).double().softmax(dim=-1)
    torch.testing.assert_close(
        entropies[:, 1:].double(), -(probabilities * probabilities.log()).sum(dim=-1), atol=1e-5, rtol=1e-5
    )
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    assert torch.equal(model.entropy(changed)[:, :10], entropies[:, :10])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 30, 1000])
def test_entropies_by_slices_are_those_of_all_logits_at_once(
    rows: int, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = small(num_classes=None), torch.randint(50, (2, 16))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        wanted = token_entropy(model(tokens))
        monkeypatch.setattr(models.gpt, "_SLICE_LOGITS", rows * 50 + 49)
        products: list[int] = []
        model.output.register_forward_hook(lambda *event: products.append(len(event[2])))
        found = model.entropy(tokens)
    assert found.dtype == torch.float32
    assert sum(products) == 30
    assert max(products) == min(rows, 30)
    torch.testing.assert_close(found[:, 1:], wanted, atol=1e-5, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        made = operation(*arguments, **(keywords or {}))
        if isinstance(made, torch.Tensor):
            self.bytes = max(self.bytes, made.numel() * made.element_size())
        return made


@pytest.mark.slow
def test_entropies_of_a_large_batch_never_hold_all_logits() -> None:
    size = {"dim": 8, "num_layers": 1, "num_heads": 2}
    model = GPT(GPTConfig(**size, codebook_size=16384, num_tokens=256, num_classes=None)).eval()
    tokens = torch.randint(16384, (12, 256))
    with torch.inference_mode(), LargestTensor() as largest:
        entropies = model.entropy(tokens)
    assert entropies.flatten().tolist() == pytest.approx([9.70406] * entropies.numel(), abs=1e-4)
    assert largest.bytes <= 2**26 < 12 * 255 * 16384 * 4


def test_entropy_is_float32_whatever_the_logits_are() -> None:
    assert token_entropy(torch.zeros(3, 7, dtype=torch.bfloat16)).dtype == torch.float32
    assert token_entropy(torch.zeros(7)).item() == pytest.approx(math.log(7))


def test_another_number_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="4 tokens an image, the model is for 16"):
        small()(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([0]))


@pytest.mark.parametrize("grid", [8, 16, 24, 32])
@pytest.mark.parametrize("num_classes", [5, None])
def test_every_grid_trains_from_the_logarithm_of_the_codebook(grid: int, num_classes: int | None) -> None:
    config = GPTConfig(
        dim=32, num_layers=1, num_heads=2, codebook_size=50, num_tokens=grid * grid, num_classes=num_classes
    )
    model, tokens = GPT(config), torch.randint(50, (2, grid * grid))
    loss = model.loss(tokens, None if num_classes is None else torch.tensor([0, 4]))
    assert loss.item() == pytest.approx(math.log(50), abs=1e-5)
    loss.backward()
    assert model.output.weight.grad is not None
    assert model.output.weight.grad.any()


def test_the_order_of_images_does_not_matter() -> None:
    model, tokens, labels = small(), torch.randint(50, (4, 16)), torch.tensor([0, 1, 2, 3])
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(tokens[order], labels[order]), model(tokens, labels)[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_tokens": 15}, "num_tokens is 15, expected a square number"),
        ({"dim": 30}, "dim is 30 with 4 heads"),
        ({"dim": 24}, "expected a head width that is a multiple of 4"),
    ],
)
def test_shapes_that_cannot_be_are_refused_when_the_model_is_built(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**{"num_heads": 4} | changes)


def test_labels_are_needed_exactly_where_there_are_classes() -> None:
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected them exactly when the model has classes"):
        small()(tokens)
    with pytest.raises(ValueError, match="expected them exactly when the model has classes"):
        small(num_classes=None)(tokens, torch.tensor([0, 1]))
