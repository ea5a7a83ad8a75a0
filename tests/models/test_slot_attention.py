"""Slot attention: plain torch against one row at a time, and the Triton kernel against plain torch, both on a CPU.

The kernel runs in Triton's interpreter. It is chosen when Triton is imported, so it needs a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from fake_cuda import CUDA, fake_cuda
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import slot_attention as module
from models.attention import causal_attention
from models.slot_attention import kernel_refusal, slot_attention, slot_attention_plain, store

ROOT = Path(__file__).resolve().parents[2]
CPU, FLOAT32, BFLOAT16, FLOAT16 = torch.device("cpu"), torch.float32, torch.bfloat16, torch.float16
TOLERANCES = {FLOAT32: 1e-5, BFLOAT16: 1e-2, FLOAT16: 2e-3}
INTERPRETED = '''
import sys
import models.slot_attention
assert "triton" not in sys.modules, "importing models must not import Triton"
from models.slot_attention_kernel import attend
from safetensors.torch import load_file, save_file
from triton.runtime import interpreter

def patch_tensor(tensor, scope):
    """Triton 3.6 calls int() of arrays with one axis for the bounds of a loop, which numpy 2.4 refuses."""
    patch_all_else(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

patch_all_else, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, patch_tensor
given = load_file(sys.argv[1])
found = {}
for case in {name.partition("/")[0] for name in given}:
    q, *others = (given[f"{case}/{name}"] for name in ("q", "keys", "values", "slots", "lengths"))
    q = q.repeat(1, 2, 1)[:, : q.shape[1]]  # queries lie beside keys, as a block computes them
    found[case] = attend(q, *others)
save_file(found, sys.argv[2])
'''


class Step(NamedTuple):
    """Arguments of `slot_attention`."""

    q: Tensor
    keys: Tensor
    values: Tensor
    slots: Tensor
    lengths: Tensor


def a_step(
    width: int, dtype: torch.dtype, slots: list[int], lengths: list[int], *, heads: int = 1, capacity: int | None = None
) -> Step:
    """Random queries and a cache. Whatever no row counts is NaN."""
    torch.manual_seed(width)
    capacity = capacity or max(lengths)
    shape = (max(slots) + 1, heads, capacity, width)
    counted = torch.zeros(shape[0], capacity, dtype=torch.bool)
    for slot, length in zip(slots, lengths, strict=True):
        counted[slot, :length] = True
    keys, values = (torch.randn(shape).where(counted[:, None, :, None], torch.nan) for _ in range(2))
    q = 3 * torch.randn(len(slots), heads, width)
    return Step(q.to(dtype), keys.to(dtype), values.to(dtype), torch.tensor(slots), torch.tensor(lengths))


def every_length(width: int, dtype: torch.dtype, capacity: int) -> Step:
    """Rows of all lengths, each in a slot of its own; slots are in another order than rows."""
    slots = torch.randperm(capacity, generator=torch.Generator().manual_seed(0))
    return a_step(width, dtype, slots.tolist(), list(range(1, capacity + 1)))


def one_by_one(step: Step) -> Tensor:
    """The definition: SDPA of each row, over the positions that count."""
    rows = []
    for q, slot, length in zip(step.q, step.slots, step.lengths, strict=True):
        key, value = (cached[slot, :, :length].float() for cached in (step.keys, step.values))
        rows.append(F.scaled_dot_product_attention(q.float()[:, None], key, value)[:, 0])
    return torch.stack(rows).type_as(step.q)


def assert_near(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def shared_slots(width: int, dtype: torch.dtype) -> Step:
    """Rows that share slots, and padded rows, which read one position of the last slot."""
    return a_step(width, dtype, [2, 0, 2, 1, 0, 5, 5], [9, 150, 71, 1, 150, 1, 1], heads=2, capacity=161)


def int32_indices(step: Step) -> Step:
    return step._replace(slots=step.slots.int(), lengths=step.lengths.int())


def mixed_dtypes(step: Step) -> Step:
    return step._replace(q=step.q.float())


def large_scores(step: Step) -> Step:
    return step._replace(q=100 * step.q)


STEPS: dict[str, Callable[[], Step]] = {
    "64 channels": lambda: every_length(64, FLOAT32, 70),  # the kernel reads blocks of 64 positions
    "100 channels, bfloat16": lambda: every_length(100, BFLOAT16, 38),  # of 32
    "shared slots of 32 channels, bfloat16": lambda: shared_slots(32, BFLOAT16),  # of 128
    "shared slots of 64 channels": lambda: shared_slots(64, FLOAT32),
    "shared slots of 100 channels": lambda: shared_slots(100, FLOAT32),
    "shared slots of 128 channels, float16": lambda: shared_slots(128, FLOAT16),
    "shared slots of 16 channels, int32 indices": lambda: int32_indices(shared_slots(16, FLOAT32)),
    "float32 queries of a bfloat16 cache": lambda: mixed_dtypes(shared_slots(48, BFLOAT16)),
    "scores whose exponentials overflow": lambda: large_scores(shared_slots(64, BFLOAT16)),
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the kernel computes for each of `STEPS`."""
    folder = tmp_path_factory.mktemp("interpreted")
    given, found = folder / "given.safetensors", folder / "found.safetensors"
    steps = {name: make() for name, make in STEPS.items()}
    tensors = {f"{name}/{part}": tensor for name, step in steps.items() for part, tensor in step._asdict().items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, given)
    command = [sys.executable, "-W", "error", "-c", INTERPRETED, given, found]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
    return load_file(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_the_kernel_computes_what_plain_torch_does(name: str, interpreted: dict[str, Tensor]) -> None:
    assert_near(interpreted[name], slot_attention_plain(*STEPS[name]()))


@pytest.mark.parametrize("name", STEPS)
def test_rows_attend_to_the_first_positions_of_their_slots(name: str) -> None:
    step = STEPS[name]()
    assert_near(slot_attention(*step), one_by_one(step))


def test_slots_that_grow_on_own_clocks_equal_the_whole_sequence() -> None:
    torch.manual_seed(0)
    images, length, heads, width, scratch = 3, 20, 2, 8, 3
    q, k, v = (torch.randn(images, length, heads, width) for _ in range(3))
    whole = causal_attention(q, k, v)
    keys, values = (torch.full((scratch + 1, heads, length, width), torch.nan) for _ in range(2))
    clocks = torch.zeros(images, dtype=torch.int64)
    while int(clocks.min()) < length:
        images_now = ((torch.rand(images) < 0.6) & (clocks < length)).nonzero()[:, 0]
        places, count = clocks[images_now], len(images_now)
        slots = F.pad(images_now, (0, images - count), value=scratch)  # rows are padded to a full batch
        positions = F.pad(places, (0, images - count))
        rows = [F.pad(x[images_now, places], (0, 0, 0, 0, 0, images - count)) for x in (q, k, v)]
        store(keys, values, rows[1], rows[2], slots, positions)
        found = slot_attention(rows[0], keys, values, slots, positions + 1)
        torch.testing.assert_close(found[:count], whole[images_now, places], atol=1e-5, rtol=1e-5)
        clocks[images_now] += 1


def test_a_cache_that_is_not_contiguous_is_an_error() -> None:
    step = shared_slots(16, FLOAT32)
    half = torch.stack([step.keys, step.values], dim=2)
    with pytest.raises(
        ValueError, match=r"keys have strides .*, expected contiguous tensors: allocate keys and values"
    ):
        slot_attention(step.q, half[:, :, 0], half[:, :, 1], step.slots, step.lengths)


@pytest.mark.slow
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_only_cuda_takes_the_operator_and_nothing_waits_for_the_device(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks do not know fake tensors
    with fake_cuda(monkeypatch) as waits, Operators() as operators:
        q, cache = torch.empty(4, 3, 16, device=device), torch.empty(6, 3, 20, 16, device=device)
        indices = torch.ones(4, dtype=torch.int64, device=device)
        store(cache, cache, q, q, indices, indices)
        expected = slot_attention_plain(q, cache, cache, indices, indices)
        found = slot_attention(q, cache, cache, indices, indices)
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    assert operators.ours == (["slot_attention"] if device == CUDA else [])
    assert not waits.found


class Operators(TorchDispatchMode):
    """Collects the names of this project's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dpar":
            self.ours.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


def test_a_device_that_refuses_the_kernel_takes_plain_torch() -> None:
    step = shared_slots(16, FLOAT32)
    assert kernel_refusal(CPU, FLOAT32, 16) == "it is for CUDA only, and the device is cpu"
    assert_near(module._slot_attention_cuda(*step), one_by_one(step))


def refusal(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> str | None:
    """What is said of a simulated device."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernel_refusal.cache_clear()
    with FakeTensorMode():
        found = kernel_refusal(CUDA, BFLOAT16, 64)
    kernel_refusal.cache_clear()
    return found


def test_the_kernel_is_refused_without_triton_and_on_old_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(monkeypatch, (7, 5)) == "Triton needs compute capability 8.0, and the device has sm 7.5"
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert refusal(monkeypatch) == "Triton is not installed"


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (RuntimeError("Failed to find C compiler. Please"), "RuntimeError: Failed to find C compiler. Please"),
        (OSError("Read-only file system\nmore"), "OSError: Read-only file system"),
        (None, None),
    ],
)
def test_the_kernel_is_refused_where_triton_cannot_build_it(
    error: Exception | None, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: Any) -> None:
        if error:
            raise error

    monkeypatch.setattr(module, "_attend_on", build)
    assert refusal(monkeypatch) == (found and f"Triton cannot build it ({found})")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "width", "num_bytes"), [(80, 64, 16), (90, 64, 16), (100, 64, 16), (90, 100, 8)]
)
def test_the_kernel_compiles_for_a_gpu_and_copies_wide_words_ahead_of_their_use(
    capability: int, width: int, num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compiled without a GPU. A position of 100 channels in bfloat16 is a multiple of 8 bytes, not of 16."""
    assembly = compiled(capability, width, tmp_path, monkeypatch)
    assert f"sm_{capability}" in assembly
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x(\w+)", assembly)
    assert {int(size, 16) for size in copies} == {num_bytes}


def compiled(capability: int, width: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """PTX of the kernel for bfloat16, as it is compiled at its first call."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from models.slot_attention_kernel import _attend_head, block_shape

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    constants = {"channel_stride": 1} | block_shape(width)
    types = dict.fromkeys(("q", "keys", "values", "out"), "*bf16") | dict.fromkeys(("slots", "lengths"), "*i64")
    types |= dict.fromkeys(("row_stride", "head_stride", "capacity"), "i32") | {"scale": "fp32"}
    signature = {name: types.get(name, "constexpr") for name in _attend_head.arg_names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if "*" in kind}
    source = ASTSource(_attend_head, signature, constants, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm["ptx"]
