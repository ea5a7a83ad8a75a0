"""Compiled blocks train as eager ones do, on ragged batches, and compile once for all of them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, library, nn

import models.attention
import stages.training.compiled
from models.config import DPARConfig, GPTConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.packed_patches import PackedPatches, pack_patches
from models.patching import PatchRule, patch_starts
from stages.runtime.errors import InputError
from stages.training.compiled import compile_as_set, compile_blocks, is_compiled
from stages.training.recomputed import recompute_blocks

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
    made: list[nn.Module] = []
    monkeypatch.setattr(stages.training.compiled, "compile_blocks", made.append)
    assert is_compiled(wanted, torch.device(device)) == compiled
    compile_as_set(nn.Linear(1, 1), wanted, torch.device(device))
    assert len(made) == compiled
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


def eager_and_compiled(device: torch.device, *, bfloat16: bool) -> tuple[list[float], list[float], DPAR]:
    """Losses of both, and the compiled model."""
    torch.compiler.reset()
    torch.manual_seed(0)
    eager = DPAR(SIZE)
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled)
    assert set(compiled.state_dict()) == set(eager.state_dict())
    return losses(eager, device, bfloat16=bfloat16), losses(compiled, device, bfloat16=bfloat16), compiled


def step(model: DPAR) -> tuple[Tensor, list[Tensor], int]:
    """Loss and gradients of a step, and the bytes that its forward pass keeps."""
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    model.zero_grad()
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with saved, torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(*batches()[0])
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], kept


@dataclass(frozen=True)
class Steps:
    """Losses of the twenty steps of an eager and of a compiled model, that model, and how often it was compiled."""

    eager: list[float]
    compiled: list[float]
    model: DPAR
    graphs: int


@pytest.fixture(scope="module")
def steps() -> Iterator[Steps]:
    """All that the compiler does but making machine code, which takes it two minutes for these blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        torch._dynamo.utils.counters.clear()
        eager, compiled, model = eager_and_compiled(torch.device("cpu"), bfloat16=True)
        yield Steps(eager, compiled, model, torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_twenty_compiled_steps_have_the_losses_of_eager_ones(steps: Steps) -> None:
    assert steps.eager[-1] < steps.eager[0] - 0.1
    assert steps.compiled == pytest.approx(steps.eager, rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_are_computed_again_as_a_whole(steps: Steps) -> None:
    """The blocks of those steps, so that they are not compiled again."""
    loss, gradients, kept = step(steps.model)
    recompute_blocks(steps.model)
    found_loss, found, found_kept = step(steps.model)
    assert torch.equal(found_loss, loss)
    for expected, gradient in zip(gradients, found, strict=True):
        torch.testing.assert_close(gradient, expected)
    assert found_kept < 0.5 * kept


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_twenty_batches_with_other_lengths_compile_nothing_anew(steps: Steps) -> None:
    """One graph for each stack of whole sequences, and four where attention on packed rows is left out."""
    assert steps.graphs == 2 + 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_machine_code_of_a_block_gives_its_gradients() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    shape = {"codebook_size": CODES, "num_tokens": TOKENS, "num_classes": 3}
    undropped = {"dropout": 0.0, "class_dropout_prob": 0.0}  # the compiler draws other random numbers
    eager = GPT(GPTConfig(dim=32, num_layers=2, num_heads=2, **shape, **undropped)).train()
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled)
    tokens, labels, _ = batches()[0]
    for model in (eager, compiled):
        model.loss(tokens, labels).backward()
    for expected, found in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-6, rtol=1e-4)


@library.custom_op("dpar_tests::dense", mutates_args=())
def dense(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    """What CUDA's kernels compute, opaque to the compiler as they are."""
    row = torch.arange(len(q))
    image = torch.bucketize(row, ends[1:], right=True)
    unseen = (image[:, None] != image) | (row[:, None] < row)
    scores = torch.einsum("qhk,phk->hqp", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqp,phk->qhk", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)


dense.register_fake(lambda q, k, v, ends: torch.empty_like(q))


def xformers_twin(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
    return dense(q[0], k[0], v[0], attn_bias.q_seqinfo.seqstart)[None]


def varlen_twin(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *_: object, is_causal: bool) -> Tensor:
    assert is_causal
    return dense(q, k, v, ends)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backend", "graphs"), [("xformers", 4), ("varlen", 1)])
@torch.no_grad()
def test_a_block_of_packed_rows_is_one_graph_but_for_operators_that_cannot_be_traced(
    backend: str, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty batches with other lengths compile nothing anew: one graph, and more where it breaks."""
    monkeypatch.setattr("xformers.ops.memory_efficient_attention", xformers_twin)
    monkeypatch.setattr(models.attention, "varlen_attn", varlen_twin)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    eager = DPAR(SIZE)
    nn.init.normal_(eager.output.weight, std=0.1)
    traced = copy.deepcopy(eager)
    for block in traced.layers:
        # Traced as by `compile_blocks`, but no code is made: that takes half a minute.
        block.forward = torch.compile(block.forward, dynamic=True, backend="eager")
    expected = [eager.loss(*batch).item() for batch in batches()]
    monkeypatch.setattr(models.attention, "packed_backend", lambda *_, **__: backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = [traced.loss(*batch).item() for batch in batches()]
    assert found == pytest.approx(expected, rel=1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")
def test_twenty_compiled_steps_on_cuda_have_the_losses_of_eager_ones() -> None:
    eager, compiled, _ = eager_and_compiled(torch.device("cuda"), bfloat16=True)
    assert compiled == pytest.approx(eager, rel=1e-3)
