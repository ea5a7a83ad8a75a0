"""The test suite checks the shapes that signatures in models/ state, and every public one states them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import types
from collections.abc import Callable, Iterator
from typing import Any, Union, get_args, get_origin, get_type_hints

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models
from models.attention import causal_attention
from models.boundaries import NextTokens
from models.dpar import DPAR
from models.layers import Attend, LabelEmbedder
from models.patch_tables import pack_bits
from models.patching import PatchRule, patch_starts

ZEROS, PLACES = torch.zeros(2, 16), torch.zeros(2, dtype=torch.int64)
WRONG: dict[str, Callable[[], Any]] = {
    "one axis too few": lambda: patch_starts(PatchRule(1.0, 4, True, 4), torch.zeros(16)),
    "an axis of another size": lambda: causal_attention(
        torch.zeros(2, 5, 1, 4), torch.zeros(2, 5, 1, 4), torch.zeros(2, 6, 1, 4)
    ),
    "whole numbers for real ones": lambda: patch_starts(PatchRule(1.0, 4, True, 4), ZEROS.long()),
    "numbers for flags, in numpy": lambda: pack_bits(np.zeros((2, 16))),
    "fields of a dataclass that disagree": lambda: NextTokens(
        PLACES, PLACES, PLACES, PLACES, torch.zeros(3, 8), PLACES
    ),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_a_type_error(call: Callable[[], Any]) -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="Type-check error whilst checking the parameters of models"):
        call()


def test_a_wrong_result_is_a_type_error() -> None:
    embedder = LabelEmbedder(3, 4, 0.0)
    embedder.embedding_table = nn.Identity()
    with pytest.raises(jaxtyping.TypeCheckError, match=r"the return value of models\.layers\.LabelEmbedder\.forward"):
        embedder(torch.tensor([0, 1]))


def test_tensors_without_data_are_checked_as_others(dpar: Callable[..., DPAR]) -> None:
    model, meta = dpar().to("meta"), torch.device("meta")
    tokens = torch.zeros(2, 16, dtype=torch.int64, device=meta)
    assert model.token_states(tokens).shape == (2, 16, 64)
    with pytest.raises(jaxtyping.TypeCheckError):
        model.token_states(tokens[0])


def public() -> Iterator[tuple[str, Any]]:
    """Functions, methods and dataclasses of models/ whose names have no underscore, with their full names."""
    for module in pkgutil.iter_modules(models.__path__, "models."):
        for name, member in vars(importlib.import_module(module.name)).items():
            if name.startswith("_") or getattr(member, "__module__", None) != module.name:
                continue
            if inspect.isfunction(member):
                yield f"{module.name}.{name}", member
            elif inspect.isclass(member):
                if dataclasses.is_dataclass(member):
                    yield f"{module.name}.{name}", member
                for method, function in vars(member).items():
                    function = getattr(function, "__func__", getattr(function, "fget", function))
                    if inspect.isfunction(function) and (method == "__init__" or not method.startswith("_")):
                        yield f"{module.name}.{name}.{method}", function


def bare_arrays(hint: Any) -> bool:
    """Whether a hint has an array without a shape; the arguments of callables may."""
    if hint == Attend:
        return False
    if get_origin(hint) in (Union, types.UnionType, tuple, list):
        return any(bare_arrays(part) for part in get_args(hint))
    return hint is Tensor or hint is np.ndarray or get_origin(hint) is np.ndarray


def test_every_public_signature_states_its_shapes() -> None:
    found = dict(public())
    assert {"models.dpar.DPAR.loss", "models.packed_patches.PackedPatches", "models.gpt.token_entropy"} <= set(found)
    bare = [
        f"{name}: {parameter}"
        for name, member in found.items()
        for parameter, hint in get_type_hints(inspect.unwrap(member)).items()
        if bare_arrays(hint)
    ]
    assert bare == []
