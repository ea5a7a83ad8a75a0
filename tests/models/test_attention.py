"""Packed attention: every backend against a dense softmax under xformers' own mask, and the choice of the backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models import attention
from models.attention import Backend, causal_attention, packed_backend, packed_causal_attention, use_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _automatic_choice() -> Iterator[None]:
    """Each test starts and ends with the automatic choice, and forgets what was asked of a simulated device."""
    yield
    use_backend("auto", CPU)
    attention.backend_refusal.cache_clear()


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Empty tensors on a simulated CUDA device."""
    attention.backend_refusal.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield monkeypatch


def simulate(patch: pytest.MonkeyPatch, capability: tuple[int, int], *, xformers: bool = True) -> None:
    """A device of some compute capability, with or without the operators of xformers."""
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    patch.setattr("xformers.ops.fmha.common._built_with_cuda", xformers)


def qkv(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(*shape), torch.randn(*shape), torch.randn(*shape)


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.einsum("qhk,phk->hqp", q, k) / q.shape[-1] ** 0.5 + bias
    return torch.einsum("hqp,phk->qhk", scores.softmax(dim=-1), v)


def block_causal(lengths: list[int]) -> Tensor:
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    total = sum(lengths)
    return BlockDiagonalCausalMask.from_seqlens(lengths).materialize((1, 1, total, total))[0, 0]


def xformers_twin(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
    """`memory_efficient_attention` on a CPU."""
    mask = attn_bias.materialize((1, 1, q.shape[1], q.shape[1]))[0, 0]
    return dense(q[0], k[0], v[0], mask)[None]


def varlen_twin(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _: Tensor, longest: int, __: int, is_causal: bool = False
) -> Tensor:
    """`varlen_attn` on a CPU."""
    assert starts.dtype == torch.int32
    assert is_causal
    assert longest == int(starts.diff().max())
    return dense(q, k, v, block_causal(starts.diff().tolist()))


@pytest.mark.parametrize("lengths", [[5], [1, 7, 3], [4, 4, 4], [1, 1]])
@pytest.mark.parametrize("backend", ["padded", "xformers", "varlen"])
def test_packed_attention_equals_a_dense_softmax_under_the_block_diagonal_mask(
    lengths: list[int], backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xformers.ops.memory_efficient_attention", xformers_twin)
    monkeypatch.setattr(attention, "varlen_attn", varlen_twin)
    monkeypatch.setattr(attention, "packed_backend", lambda *_, **__: backend)
    q, k, v = qkv(sum(lengths), 2, 8)
    found = packed_causal_attention(lengths, CPU, 8)(q, k, v)
    torch.testing.assert_close(found, dense(q, k, v, block_causal(lengths)), atol=1e-5, rtol=1e-5)


def test_varlen_attention_is_causal_in_old_and_new_versions_of_torch() -> None:
    def old(*tensors: Tensor, is_causal: bool = False) -> None: ...

    def new(*tensors: Tensor, window_size: tuple[int, int] = (-1, -1)) -> None: ...

    assert attention._causal_option(old) == {"is_causal": True}
    assert attention._causal_option(new) == {"window_size": (-1, 0)}


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_xformers_attends_in_bfloat16_on_every_gpu_since_ampere(
    capability: tuple[int, int], head_dim: int, on_cuda: pytest.MonkeyPatch
) -> None:
    simulate(on_cuda, capability)
    assert packed_backend(CUDA, BFLOAT16, head_dim) == "xformers"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_varlen_attends_where_xformers_does_not_load(capability: tuple[int, int], on_cuda: pytest.MonkeyPatch) -> None:
    simulate(on_cuda, capability, xformers=False)
    assert packed_backend(CUDA, BFLOAT16, 64) == "varlen"
    assert packed_backend(CUDA, FLOAT32, 64) == "padded"


def test_compiled_code_takes_varlen_first_which_needs_no_break(on_cuda: pytest.MonkeyPatch) -> None:
    simulate(on_cuda, (9, 0))
    assert packed_backend(CUDA, BFLOAT16, 64, compiled=True) == "varlen"
    assert packed_backend(CUDA, FLOAT32, 64, compiled=True) == "xformers"


def test_varlen_attends_where_xformers_is_not_installed(on_cuda: pytest.MonkeyPatch) -> None:
    simulate(on_cuda, (9, 0))
    on_cuda.setitem(__import__("sys").modules, "xformers.ops.fmha", None)
    assert packed_backend(CUDA, BFLOAT16, 64) == "varlen"


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), "xformers"), ((9, 0), "xformers"), ((10, 0), "padded"), ((12, 0), "padded")]
)
def test_float32_has_a_backend_on_every_gpu(
    capability: tuple[int, int], expected: Backend, on_cuda: pytest.MonkeyPatch
) -> None:
    simulate(on_cuda, capability)
    assert packed_backend(CUDA, FLOAT32, 64) == expected


def test_a_head_width_that_is_no_multiple_of_8_is_padded_in_bfloat16(on_cuda: pytest.MonkeyPatch) -> None:
    simulate(on_cuda, (9, 0))
    assert packed_backend(CUDA, BFLOAT16, 100) == "padded"


def test_a_gpu_before_ampere_pads_bfloat16(on_cuda: pytest.MonkeyPatch) -> None:
    simulate(on_cuda, (7, 5))
    assert packed_backend(CUDA, BFLOAT16, 64) == "padded"


def test_other_devices_pad_and_do_not_import_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_xformers_refusal", lambda *_: pytest.fail("asked xformers"))
    assert packed_backend(CPU, BFLOAT16, 64) == "padded"
    assert packed_backend(torch.device("meta"), FLOAT32, 64) == "padded"


def test_a_chosen_backend_is_taken_and_pads_what_it_has_no_operator_for(on_cuda: pytest.MonkeyPatch) -> None:
    simulate(on_cuda, (10, 0))
    use_backend("varlen", CUDA)
    assert packed_backend(CUDA, BFLOAT16, 64) == "varlen"
    assert packed_backend(CUDA, FLOAT32, 64) == "padded"
    use_backend("padded", CUDA)
    assert packed_backend(CUDA, BFLOAT16, 64) == "padded"


def test_a_chosen_backend_without_operators_is_an_error(on_cuda: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="attention is xformers, but xformers has operators for CUDA only"):
        use_backend("xformers", CPU)
    simulate(on_cuda, (9, 0), xformers=False)
    with pytest.raises(ValueError, match=r"operators of xformers do not load beside torch 2.*: use attention=auto"):
        use_backend("xformers", CUDA)
    simulate(on_cuda, (7, 5), xformers=False)
    with pytest.raises(ValueError, match=r"varlen_attn needs compute capability 8.0, and the device has sm 7.5"):
        use_backend("varlen", CUDA)
    assert packed_backend(CPU, FLOAT32, 64) == "padded"


def test_bfloat16_attention_on_the_cpu_stays_near_float32_in_values_and_gradients() -> None:
    exact = [x.requires_grad_() for x in qkv(3, 20, 2, 16)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    weights = torch.randn(3, 20, 2, 16)
    found, expected = causal_attention(*rounded), causal_attention(*exact)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=3e-2, rtol=3e-2)
    (found.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(rounded, exact, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad.float(), b.grad, atol=6e-2, rtol=6e-2)
