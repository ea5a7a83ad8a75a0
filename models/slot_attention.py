"""Attention of one query a row over the slots of a cache, for rows at different positions.

Every image that is being sampled has a slot of a preallocated cache. A step takes some of the slots, in any order, and
each has its own number of positions. Shapes never depend on values and the host waits for nothing, so a CUDA graph can
capture a step. On CUDA a Triton kernel reads each key and value once; elsewhere plain torch copies the slots first.

Shapes: S slots of the cache, T positions of a slot, R rows of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor, library

from models.attention import plain_attention


def slot_attention(
    q: Float[Tensor, "R H K"],
    keys: Float[Tensor, "S H T K"],
    values: Float[Tensor, "S H T K"],
    slots: Int[Tensor, " R"],
    lengths: Int[Tensor, " R"],
) -> Float[Tensor, "R H K"]:
    """Attention of each row's query to the first positions of its slot, with scale K**-0.5 and a float32 softmax.

    It is for sampling and has no gradients on CUDA. Call it once with the same arguments before a CUDA graph captures
    it: the first call compiles the kernel.

    Args:
        q: One query a row. Any strides.
        keys: Contiguous.
        values: Contiguous.
        slots: Slot that each row reads, 0..S-1. Rows may share a slot.
        lengths: Positions 0..length-1 of the slot count, 1..T. Later positions may hold anything, NaN too.

    Raises:
        ValueError: Keys or values are not contiguous.
    """
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(
            f"keys have strides {keys.stride()} and values {values.stride()}, expected contiguous tensors: allocate "
            "keys and values of a layer as two tensors (S, H, T, K), and pass them whole"
        )
    if q.device.type == "cuda":
        return _OPERATOR(q, keys, values, slots, lengths)
    return slot_attention_plain(q, keys, values, slots, lengths)


def slot_attention_plain(
    q: Float[Tensor, "R H K"],
    keys: Float[Tensor, "S H T K"],
    values: Float[Tensor, "S H T K"],
    slots: Int[Tensor, " R"],
    lengths: Int[Tensor, " R"],
) -> Float[Tensor, "R H K"]:
    """Attention as in `slot_attention`, in plain torch. It copies the slots of all rows in float32."""
    later = torch.arange(keys.shape[2], device=q.device) >= lengths[:, None]  # (R, T)
    key, value = (cached.index_select(0, slots).float() for cached in (keys, values))  # (R, H, T, K)
    value = value.masked_fill(later[:, None, :, None], 0.0)  # a weight of zero times NaN is NaN
    attended = plain_attention(q.float()[:, :, None], key, value, later[:, None, None])
    return attended[:, :, 0].type_as(q)


def store(
    keys: Float[Tensor, "S H T K"],
    values: Float[Tensor, "S H T K"],
    k: Float[Tensor, "*R H K"],
    v: Float[Tensor, "*R H K"],
    slots: Int[Tensor, "*#R"],
    positions: Int[Tensor, "*#R"],
) -> None:
    """Write the key and the value of each row into its slot, at the row's position.

    If rows share a slot and a position, any of them may be the one that stays.
    """
    keys[slots, :, positions] = k
    values[slots, :, positions] = v


@lru_cache
def kernel_refusal(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the Triton kernel cannot run, as the end of a sentence; None if it can. Plain torch attends then.

    Triton compiles on the user's machine, which needs a C compiler, Python's headers and a folder that it may write. So
    the kernel runs once, on one position.
    """
    if device.type != "cuda":
        return f"it is for CUDA only, and the device is {device}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        found = "sm {}.{}".format(*torch.cuda.get_device_capability(device))
        return f"Triton needs compute capability 8.0, and the device has {found}"
    cache = torch.zeros(1, 1, 1, width, dtype=dtype, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        _attend_on(device, cache[0], cache, cache, slots, slots + 1)
    except Exception as error:  # Triton's, its compiler's and the operating system's have no common class
        return f"Triton cannot build it ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    return None


def _attend_on(device: torch.device, *arguments: Tensor) -> Tensor:
    """The kernel on the device of its arguments: Triton launches on the current one."""
    from models.slot_attention_kernel import attend

    with torch.cuda.device(device):
        return attend(*arguments)


def _slot_attention_cuda(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
    if kernel_refusal(q.device, q.dtype, q.shape[-1]):
        return slot_attention_plain(q, keys, values, slots, lengths)
    return _attend_on(q.device, q, keys, values, slots, lengths)


def _slot_attention_fake(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def _registered() -> Callable[..., Tensor]:
    """The operator dpar::slot_attention. Compiled code calls it as a whole, and fake tensors pass through it.

    `custom_op` would load the compiler at the first call, two seconds.
    """
    _LIBRARY.define("slot_attention(Tensor q, Tensor keys, Tensor values, Tensor slots, Tensor lengths) -> Tensor")
    _LIBRARY.impl("slot_attention", _slot_attention_cuda, "CUDA")
    library.register_fake("dpar::slot_attention", _slot_attention_fake, lib=_LIBRARY)
    return torch.ops.dpar.slot_attention.default


_LIBRARY = library.Library("dpar", "FRAGMENT")
_OPERATOR = _registered()
