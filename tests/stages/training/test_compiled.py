"""Compiled blocks train as eager ones do, on ragged batches, and compile once for all of them."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

import models.attention
from models.config import DPARConfig
from models.dpar import DPAR
from models.packed_patches import PackedPatches, pack_patches
from models.patching import PatchRule, patch_starts
from stages.runtime.errors import InputError
from stages.training.compiled import compile_blocks, is_compiled

STEPS, TOKENS, CODES = 20, 16, 64
SIZE = DPARConfig(
    dim=32,
    num_heads=2,
    encoder_layers=1,
    global_layers=2,
    decoder_layers=1,
    codebook_size=CODES,
    num_tokens=TOKENS,
    num_classes=3,
    dropout=0.0,
    class_dropout_prob=0.0,
)


@pytest.mark.parametrize(
    ("wanted", "device", "compiler", "compiled"),
    [
        (None, "cpu", True, False),
        (None, "cuda", True, True),
        (None, "cuda", False, False),
        (False, "cuda", True, False),
        (True, "cpu", True, True),
    ],
)
def test_a_gpu_compiles_by_default_and_without_a_compiler_says_so(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wanted: bool | None,
    device: str,
    compiler: bool,
    compiled: bool,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if compiler else None)
    assert is_compiled(wanted, torch.device(device)) == compiled
    assert ("no C++ compiler: install g++" in caplog.text) == (not compiler)


def test_compilation_that_is_asked_for_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"runtime.compile is true and there is no C\+\+ compiler"):
        is_compiled(True, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler cannot trace the checks of shapes that every call of models/ passes in tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def batches() -> list[tuple[Tensor, Tensor, PackedPatches]]:
    """Tokens, labels and patches, more and fewer of them from step to step."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(STEPS):
        starts = patch_starts(PatchRule(0.5, 4, True, 4), torch.rand(4, TOKENS, generator=generator))
        tokens = torch.randint(CODES // 4, (4, TOKENS), generator=generator)
        made.append((tokens, torch.randint(3, (4,), generator=generator), pack_patches(starts)))
    assert len({len(patches.first) for _, _, patches in made}) > 3
    return made


def losses(model: DPAR, device: torch.device, *, bfloat16: bool) -> list[float]:
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for tokens, labels, patches in batches():
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = model.loss(tokens.to(device), labels.to(device), patches.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def eager_and_compiled(device: torch.device, *, bfloat16: bool) -> tuple[list[float], list[float]]:
    torch.manual_seed(0)
    eager = DPAR(SIZE)
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled)
    assert set(compiled.state_dict()) == set(eager.state_dict())
    return losses(eager, device, bfloat16=bfloat16), losses(compiled, device, bfloat16=bfloat16)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_twenty_compiled_steps_have_the_losses_of_eager_ones() -> None:
    torch.compiler.reset()
    eager, compiled = eager_and_compiled(torch.device("cpu"), bfloat16=True)
    assert eager[-1] < eager[0] - 0.1
    assert compiled == pytest.approx(eager, rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["xformers", "varlen", "padded"])
def test_new_lengths_at_every_step_compile_nothing_anew(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA runs, with a dense softmax under the same mask in place of its kernels."""

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.einsum("qhk,phk->hqp", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("hqp,phk->qhk", (scores + mask).softmax(-1), v)

    def xformers(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
        return dense(q[0], k[0], v[0], attn_bias.materialize((1, 1, q.shape[1], q.shape[1]))[0, 0])[None]

    def varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *_: object, is_causal: bool) -> Tensor:
        image = torch.bucketize(torch.arange(len(q)), ends[1:], right=True)
        seen = (image[:, None] == image) & torch.ones(len(q), len(q), dtype=torch.bool).tril()
        return dense(q, k, v, torch.where(seen, 0.0, -torch.inf))

    monkeypatch.setattr("xformers.ops.memory_efficient_attention", xformers)
    monkeypatch.setattr(models.attention, "_causal_varlen", lambda: partial(varlen, is_causal=True))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    eager = DPAR(SIZE)
    traced = copy.deepcopy(eager)
    for block in (*traced.local_encoder.layers, *traced.layers, *traced.local_decoder.layers):
        # Traced as by `compile_blocks`, but no code is made: that takes half a minute.
        block.forward = torch.compile(block.forward, dynamic=True, backend="eager")
    cpu = torch.device("cpu")
    expected = losses(eager, cpu, bfloat16=False)
    monkeypatch.setattr(models.attention, "packed_backend", lambda *_: backend)
    assert losses(traced, cpu, bfloat16=False) == pytest.approx(expected, rel=1e-5)
    # Rectangular and packed rows, before and after the break at the operator; not one more for twenty masks.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")
def test_twenty_compiled_steps_on_cuda_have_the_losses_of_eager_ones() -> None:
    eager, compiled = eager_and_compiled(torch.device("cuda"), bfloat16=True)
    assert compiled == pytest.approx(eager, rel=1e-3)
