"""The test suite checks the shapes that signatures in stages/ state, and every public array there has one."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, Union, get_args, get_origin, get_type_hints

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stages.images.decode import views
from stages.images.tensors import pixels_to_float
from stages.patches.thresholds import EntropySample
from stages.scores.feature_sets import ExtractorInfo, FeatureSets
from stages.scores.frechet import frechet_distance
from stages.scores.inception_score import inception_score
from stages.scores.precision_recall import precision_recall
from stages.scores.statistics import FeatureStats
from stages.scores.unigram import best_unigram_loss
from stages.training.data import TokenBatch

PACKAGES = ("stages.patches", "stages.sampling", "stages.scores")
MODULES = ("stages.images.decode", "stages.images.from_tokens", "stages.images.tensors")
ZEROS = np.zeros((5, 3))
COUNTS = ZEROS.astype(np.int64)
LITE0 = ExtractorInfo(name="lite0", weights_sha256="", fid_inception=False, input_size=8)
WRONG: dict[str, Callable[[], Any]] = {
    "one axis too few": lambda: inception_score(ZEROS[0], splits=1),
    "two arrays of different widths": lambda: precision_recall(ZEROS, ZEROS[:, :2], neighbours=1),
    "blocks of different numbers of tokens": lambda: best_unigram_loss([COUNTS], [COUNTS[:, 1:]], 2),
    "a covariance that is not square": lambda: FeatureStats(2, ZEROS[0], ZEROS),
    "channels first": lambda: pixels_to_float(np.zeros((2, 3, 8, 8), np.uint8)),
    "floats for pixels": lambda: pixels_to_float(np.zeros((2, 8, 8, 3), np.float32)),  # type: ignore[arg-type]
    "float64 for float32": lambda: EntropySample.of_array(ZEROS, 4),  # type: ignore[arg-type]
    "tokens and labels of different batches": lambda: TokenBatch(torch.zeros(2, 16).long(), torch.zeros(3).long()),
    "logits without classes": lambda: FeatureSets(
        extractor=LITE0,
        features={},
        samples_logits=ZEROS[0].astype(np.float32),
        reference=FeatureStats.of(ZEROS),
        compared=ZEROS.astype(np.float32),
    ),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_a_type_error(call: Callable[[], Any]) -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="Type-check error whilst checking the parameters of stages"):
        call()


def test_a_wrong_result_is_a_type_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.images.decode.center_crop", lambda image, size: np.zeros((size, size + 1, 3), np.uint8))
    with pytest.raises(jaxtyping.TypeCheckError, match=r"the return value of stages\.images\.decode\.views"):
        views(Image.new("RGB", (8, 8)), 8, "center")


def test_sets_of_different_sizes_are_no_error() -> None:
    first, second = FeatureStats.of(ZEROS), FeatureStats.of(ZEROS[:4])
    assert frechet_distance(first, second) == 0.0
    features = {"samples": ZEROS.astype(np.float32), "heldout": ZEROS[:2].astype(np.float32)}
    sets = FeatureSets(
        extractor=LITE0,
        features=features,
        samples_logits=ZEROS.astype(np.float32),
        reference=first,
        compared=ZEROS[:3].astype(np.float32),
    )
    assert sets.features is features


def modules() -> Iterator[types.ModuleType]:
    for package in PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            yield importlib.import_module(module.name)
    yield from map(importlib.import_module, MODULES)


def public() -> Iterator[tuple[str, Any]]:
    """Functions, methods and dataclasses whose names have no underscore, with their full names."""
    for module in modules():
        for name, member in vars(module).items():
            if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(member):
                yield f"{module.__name__}.{name}", member
            elif inspect.isclass(member):
                if dataclasses.is_dataclass(member):
                    yield f"{module.__name__}.{name}", member
                for method, function in vars(member).items():
                    function = getattr(function, "__func__", getattr(function, "fget", function))
                    if inspect.isfunction(function) and (method == "__init__" or not method.startswith("_")):
                        yield f"{module.__name__}.{name}.{method}", function


def bare_arrays(hint: Any) -> bool:
    """Whether a hint has an array without a shape; the arguments of callables may."""
    if get_origin(hint) in (Union, types.UnionType, tuple, list, dict):
        return any(bare_arrays(part) for part in get_args(hint))
    return hint is Tensor or hint is np.ndarray or get_origin(hint) is np.ndarray


def test_every_public_signature_states_its_shapes() -> None:
    found = dict(public())
    wanted = {
        "stages.scores.feature_sets.FeatureSets",
        "stages.images.decode.views",
        "stages.images.from_tokens.resize",
    }
    assert wanted <= set(found)
    bare = [
        f"{name}: {parameter}"
        for name, member in found.items()
        for parameter, hint in get_type_hints(inspect.unwrap(member), vars(sys.modules[member.__module__])).items()
        if bare_arrays(hint)
    ]
    assert bare == []
