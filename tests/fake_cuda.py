"""A CUDA device without one: fake tensors that know their device, a backward pass on them, and a watch for host waits.

A fake tensor has a shape, a dtype and a device, and no values. Operations on tensors of two devices are errors, as on a
real device. What needs values, such as `item()` and `nonzero()`, makes the host wait on a real device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten
_COPIES = {_aten._to_copy.default: "non_blocking", _aten.copy_.default: 2}  # where the call has `non_blocking`


class HostWaits(TorchDispatchMode):
    """Records what makes the host wait for the device, and answers it in place of the values.

    Attributes:
        found: Names of the operations, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_device = any(isinstance(x, Tensor) and x.device.type == "cuda" for x in args)
        if func is _aten._local_scalar_dense.default and on_device:
            self.found.append("item")
            return 1
        if func is _aten.nonzero.default and on_device:
            self.found.append("nonzero")
            return torch.zeros(args[0].shape[0], args[0].ndim, dtype=torch.int64, device=args[0].device)
        result = func(*args, **kwargs)
        if func in _COPIES and self._blocks(func, args, kwargs, result):
            self.found.append("copy")
        return result

    @staticmethod
    def _blocks(func: Any, args: Any, kwargs: Any, result: Tensor) -> bool:
        source, target = (args[0], result) if func is _aten._to_copy.default else (args[1], args[0])
        waits_not = kwargs.get("non_blocking", len(args) > 2 and args[2])
        return source.device.type != target.device.type and not waits_not


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> Iterator[HostWaits]:
    """Context in which tensors made on `CUDA` are fake, on a device of this compute capability.

    Memory cannot be pinned without a driver: pinned tensors are ordinary ones.
    """
    plain = torch.tensor
    _device_constructors()  # the functions that `with device:` changes are collected at the first use

    def tensor(data: Any, *, device: Any = None, pin_memory: bool = False, **options: Any) -> Tensor:
        made = plain(data, **options)
        return made if device is None else made.to(device)  # so that the copy is seen

    patch.setattr(torch, "tensor", tensor)
    patch.setattr(Tensor, "pin_memory", lambda self: self)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    patch.setattr("xformers.ops.fmha.attn_bias._to_device_tensor", _without_pinning)
    forget_tables()
    try:
        with FakeTensorMode(), HostWaits() as waits:
            yield waits
    finally:
        forget_tables()


def _without_pinning(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def forget_tables() -> None:
    """Empty the caches of models/: real and fake tensors must not meet."""
    for name, module in list(sys.modules.items()):
        if name.startswith("models."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def backward(loss: Tensor) -> None:
    """`loss.backward()` of fake tensors. Autograd's own engine asks for the streams of a real device.

    Nodes run in topological order, each with the sums of its gradients.
    """
    root = loss.grad_fn
    assert root is not None
    waiting, stack = {root: 0}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in waiting:
                waiting[node] = 0
                stack.append(node)
            if node is not None:
                waiting[node] += 1
    gradients: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready: list[Any] = [root]
    while ready:
        node = ready.pop()
        followers = [(following, place) for following, place in node.next_functions if following is not None]
        for (following, place), result in zip(followers, _run(node, gradients.pop(node)), strict=True):
            gradient = _fitted(result, following._input_metadata[place])
            slots = gradients.setdefault(following, {})
            slots[place] = slots[place] + gradient if place in slots else gradient
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


def _run(node: Any, gradients: dict[int, Tensor]) -> list[Tensor]:
    """Gradients of those inputs of a node that need one."""
    call = node.apply if hasattr(node, "apply") else node  # a Python function has no call of its own
    result = call(*(gradients.get(place) for place in range(len(node._input_metadata))))
    return [gradient for gradient in (result if isinstance(result, tuple) else (result,)) if gradient is not None]


def _fitted(gradient: Tensor, wanted: Any) -> Tensor:
    """The gradient with the shape and dtype of what it belongs to: autograd sums over broadcast axes and casts."""
    assert gradient.device == wanted.device
    return gradient.sum_to_size(wanted.shape).to(wanted.dtype)
