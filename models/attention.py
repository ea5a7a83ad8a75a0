"""Causal attention of whole sequences, padded or packed. Attention of single cached steps is in kv_cache.py.

Packed attention has three backends. xformers' operators and torch's `varlen_attn` attend without padding, on CUDA only.
Where neither has an operator, sequences are padded for `scaled_dot_product_attention`, which runs everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from models.layers import Attend

Backend = Literal["xformers", "varlen", "padded"]
"""Who attends within packed sequences: xformers, torch's `varlen_attn`, or SDPA on padded sequences."""

_WIDEST_FLASH_HEAD = 192  # beyond it the backward pass needs an A100 or H100
_requested: Backend | Literal["auto"] = "auto"


def causal_attention(
    q: Float[Tensor, "B S H K"], k: Float[Tensor, "B S H K"], v: Float[Tensor, "B S H K"]
) -> Float[Tensor, "B S H K"]:
    """Attention in which each position attends to itself and to those before it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # Torch's CPU kernel for bfloat16 takes four times as long, nearly all of it in the backward pass.
        later = torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        return plain_attention(q, k, v, later).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def plain_attention(
    q: Float[Tensor, "B H Q K"],
    k: Float[Tensor, "B H S K"],
    v: Float[Tensor, "B H S K"],
    masked: Bool[Tensor, "#B #H #Q S"] | None = None,
) -> Float[Tensor, "B H Q K"]:
    """Attention of Q queries by its definition, with a float32 softmax. It ignores positions that are `masked`."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, Q, S)
    if masked is not None:
        scores = scores.masked_fill(masked, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).type_as(v) @ v


def use_backend(name: Backend | Literal["auto"], device: torch.device) -> None:
    """Choose the backend of packed attention in this process; `auto` is the first that has an operator.

    Dtypes and head widths for which the chosen backend has no operator are padded, so float32 always runs.

    Raises:
        ValueError: The backend has no operator for bfloat16 on the device.
    """
    global _requested
    if name not in ("auto", "padded") and (refusal := backend_refusal(name, device, torch.bfloat16, 64)):
        raise ValueError(f"attention is {name}, but {refusal}: use attention=auto")
    _requested = name


def packed_backend(device: torch.device, dtype: torch.dtype, head_dim: int, *, compiled: bool = False) -> Backend:
    """The backend that packed attention takes for heads of `head_dim` channels.

    In compiled code it is `varlen_attn` first: the compiler sees it as one operator, and stops at xformers.
    """
    order: tuple[Backend, ...] = ("varlen", "xformers") if compiled else ("xformers", "varlen")
    wanted = order if _requested == "auto" else (_requested,)
    return next((name for name in wanted if not backend_refusal(name, device, dtype, head_dim)), "padded")


@lru_cache
def backend_refusal(name: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot attend, as the end of a sentence; None if it can."""
    if name == "padded":
        return None
    if device.type != "cuda":
        return f"{name} has operators for CUDA only, and the device is {device}"
    return (_xformers_refusal if name == "xformers" else _varlen_refusal)(device, dtype, head_dim)


def _xformers_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    try:
        from xformers.ops.fmha import common, dispatch
    except ImportError as error:
        return f"xformers cannot be imported ({error})"
    if not common._built_with_cuda:
        return f"the CUDA operators of xformers do not load beside torch {torch.__version__}"
    row = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    inputs = common.Inputs(row, row, row, _Sequences([1], torch.device("cpu")).mask)
    try:
        forward = dispatch._dispatch_fw(inputs, needs_gradient=True)
        dispatch._dispatch_bw(inputs, forward.VARLEN_LSE_PACKED)
    except NotImplementedError:
        return f"xformers has no operator for {dtype} with head width {head_dim} on {_capability(device)}"
    return None


def _varlen_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch has no flash attention, which varlen_attn runs on"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"varlen_attn needs compute capability 8.0, and the device has {_capability(device)}"
    if dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > _WIDEST_FLASH_HEAD:
        return f"varlen_attn has no operator for {dtype} with head width {head_dim}"
    return None


def _capability(device: torch.device) -> str:
    return "sm {}.{}".format(*torch.cuda.get_device_capability(device))


def packed_causal_attention(lengths: Sequence[int], device: torch.device, head_dim: int) -> Attend:
    """Causal attention inside each sequence of a packed batch, by `packed_backend`.

    Args:
        lengths: Rows of each sequence, which follow each other in the packed batch. They are Python numbers: reading
            them from a device would force a sync in every step.
        device: Where the batch is.
        head_dim: Channels of a head, K.

    Returns:
        A function of queries, keys and values (sum of `lengths`, H, K).
    """
    sequences = _Sequences(lengths, device)
    ends, longest = sequences.ends, sequences.longest
    is_traced = packed_backend(device, torch.bfloat16, head_dim, compiled=True) == "varlen"
    attend_untraced = _untraced()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and is_traced and q.dtype == torch.bfloat16:
            return _causal_varlen(q, k, v, ends, longest)
        return attend_untraced(q, k, v, sequences)

    return attend


@lru_cache(maxsize=1)
def _untraced() -> Callable[..., Tensor]:
    """Attention that compiled code calls and does not trace: the mask of xformers is another object in every step.

    A decorator would load the compiler, two seconds, in every process that imports this module.
    """
    return torch.compiler.disable(_attend_packed)


class _Sequences:
    """Where the sequences of a packed batch are, as each backend wants to know it. All layers of a stack share this."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths, self.device = lengths, device
        self.longest = max(lengths)

    @cached_property
    def mask(self) -> Any:
        """The mask of xformers."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        return BlockDiagonalCausalMask.from_seqlens(self.lengths, device=self.device)

    @cached_property
    def ends(self) -> Tensor:
        """0, then the end of each sequence: int32, on the device."""
        return self._sent(torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32))

    @cached_property
    def places(self) -> Tensor:
        """Rows of the padded batch (sequences * longest) that are real: int64, on the device."""
        real = np.arange(self.longest) < np.array(self.lengths)[:, None]
        return self._sent(torch.tensor(np.flatnonzero(real)))

    def _sent(self, values: Tensor) -> Tensor:
        """Values on the device. The host does not wait for copies from pinned memory."""
        if self.device.type != "cuda":
            return values.to(self.device)
        return values.pin_memory().to(self.device, non_blocking=True)


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, sequences: _Sequences) -> Tensor:
    return _ATTENTION[packed_backend(q.device, q.dtype, q.shape[-1])](q, k, v, sequences)


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor, sequences: _Sequences) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=sequences.mask)[0]


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, sequences: _Sequences) -> Tensor:
    return _causal_varlen(q, k, v, sequences.ends, sequences.longest)


def _causal_varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    return cast("Tensor", varlen_attn(q, k, v, ends, ends, longest, longest, **_VARLEN_CAUSAL))


def _causal_option(varlen: Callable[..., Any]) -> dict[str, Any]:
    """How `varlen_attn` is made causal: torch 2.10 has a switch for it, later versions a window to the left."""
    return {"is_causal": True} if "is_causal" in inspect.signature(varlen).parameters else {"window_size": (-1, 0)}


_VARLEN_CAUSAL = _causal_option(varlen_attn)


def _padded_attention(q: Tensor, k: Tensor, v: Tensor, sequences: _Sequences) -> Tensor:
    """Sequences are padded on the right, where the causal mask hides the padding from every real position."""
    shape = (len(sequences.lengths), sequences.longest)

    def pad(packed: Tensor) -> Tensor:
        padded = packed.new_zeros(shape[0] * shape[1], *packed.shape[1:])
        return padded.index_copy(0, sequences.places, packed).unflatten(0, shape)

    return causal_attention(pad(q), pad(k), pad(v)).flatten(0, 1).index_select(0, sequences.places)


_ATTENTION: dict[Backend, Callable[[Tensor, Tensor, Tensor, _Sequences], Tensor]] = {
    "xformers": _xformers_attention,
    "varlen": _varlen_attention,
    "padded": _padded_attention,
}
